"""Tables of codebooks: the quantiles of NF4, and k-means."""

from __future__ import annotations

import torch
from scipy.special import ndtri

from moec.dialects.quant import Codebook, Span
from moec.quantization.packed import groups_of
from moec.quantization.packing import split_last

_NF4_OFFSET = 0.5 * (1 / 32 + 1 / 30)
_ITERATIONS = 30
_SAMPLES = 1 << 16


def normal_float_table() -> torch.Tensor:
    """The 16 entries of NF4, float64 [16, 1]: quantiles of the normal distribution with an exact zero, scaled to 1.

    QLoRA (Dettmers et al. 2023, section 3): 8 quantiles below and 9 above, of which zero is shared.
    """
    below = ndtri(torch.linspace(1 - _NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    above = ndtri(torch.linspace(1 - _NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    values = torch.cat([-torch.from_numpy(below), torch.zeros(1, dtype=torch.float64), torch.from_numpy(above)])
    return (values.sort().values / values.abs().max())[:, None]


def fit_table(kind: Codebook, weight: torch.Tensor) -> torch.Tensor:
    """The table float64 [2^bits, dim] that k-means finds for a matrix float64 [N, K], in units of its scales.

    A scale is the largest absolute weight of its span. Lloyd's iteration starts from quantiles (one weight) or from
    evenly spread vectors in the order of their sums (several); at most 65,536 evenly spread vectors take part.
    """
    split = split_last(weight, groups_of(kind, weight.shape[1]))
    largest = split.abs().amax() if kind.span is Span.TENSOR else split.abs().amax(-1, keepdim=True)
    vectors = (split / torch.where(largest == 0, 1.0, largest)).reshape(-1, kind.dim)
    if len(vectors) > _SAMPLES:
        vectors = vectors[torch.div(torch.arange(_SAMPLES) * len(vectors), _SAMPLES, rounding_mode="floor")]
    ordered = vectors[vectors.sum(1).argsort(stable=True)]
    entries = 1 << kind.bits
    table = ordered[((torch.arange(entries) + 0.5) * len(ordered) / entries).long()]
    for _ in range(_ITERATIONS):
        nearest = torch.cdist(vectors, table).argmin(1)
        counts = torch.bincount(nearest, minlength=entries).double()
        sums = torch.zeros_like(table).index_add_(0, nearest, vectors)
        moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), table)
        if torch.equal(moved, table):
            break
        table = moved
    return _distinct(table) if kind.dim == 1 else table


def _distinct(table: torch.Tensor) -> torch.Tensor:
    """Ascending entries that stay apart in float32."""
    ordered = table.float().sort(dim=0).values
    for place in range(1, len(ordered)):
        if ordered[place] <= ordered[place - 1]:
            ordered[place] = torch.nextafter(ordered[place - 1], torch.tensor(torch.inf))
    return ordered.double()
