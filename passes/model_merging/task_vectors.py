"""theta = theta_0 + sum_t c_t (theta_t - theta_0), with one coefficient for each layer, model and piece of a tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.dialects.builtin import WeightOp
from moec.ir import Operation

_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")
OUTSIDE = ""
"""The layer of weights that belong to none, such as embeddings."""


@dataclass(frozen=True)
class MergedWeight:
    """A weight, as every model has it: `sources` are expressions, the base first; `layer` decides its coefficients."""

    op: WeightOp
    layer: str
    sources: tuple[str, ...]


def layer_name(weight_name: str) -> str:
    """`model.layers.3` for a weight of that layer, `OUTSIDE` for one of none."""
    found = _LAYER.match(weight_name)
    return found.group() if found else OUTSIDE


def layer_names(root: Operation) -> list[str]:
    """The layers of all weights, in order."""
    return list(dict.fromkeys(layer_name(op.weight_name) for op in root.walk() if isinstance(op, WeightOp)))


def merged(base: torch.Tensor, models: Sequence[torch.Tensor], coefficients: torch.Tensor) -> torch.Tensor:
    """The merged tensor, float32. `coefficients` [models, pieces]: a tensor is cut into pieces in row-major order.

    Differentiable by the coefficients. Zeros give the base; one 1 for all pieces gives that model, up to rounding.
    """
    pieces = coefficients.shape[1]
    flat = base.reshape(-1)
    parts = []
    for piece, start, stop in _spans(flat.numel(), pieces):
        part = flat[start:stop]
        for model, coefficient in zip(models, coefficients[:, piece], strict=True):
            part = part + coefficient * (model.reshape(-1)[start:stop] - flat[start:stop])
        parts.append(part)
    return torch.cat(parts).reshape(base.shape)


def _spans(size: int, pieces: int) -> list[tuple[int, int, int]]:
    """(piece, start, stop): equal pieces, the last ones empty where there are more pieces than elements."""
    length = max(-(-size // pieces), 1)
    cuts = [(piece, min(piece * length, size), min((piece + 1) * length, size)) for piece in range(pieces)]
    return [cut for cut in cuts if cut[1] < cut[2]]
