"""Router rows that stand for several: the linear map next to the logarithm of the summed exponentials of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.builtin import WeightOp
from moec.experts import MoeLayer, replace_router
from moec.ir import Value
from moec.weights.context import WeightContext

_RIDGE = 1e-6


def join_router_outputs(
    layer: MoeLayer,
    weights: WeightContext,
    sample: LayerSample,
    groups: Mapping[int, Sequence[int]],
    shares: Mapping[int, Sequence[float]] | None = None,
) -> MoeLayer:
    """Gives each output that is a key of `groups` the row and bias nearest to `log sum_j share_j exp z_j` of its group.

    That is the softmax mass of the whole group. `shares` are 1 by default. The fit is by least squares over the rows
    of `sample`, as a change of the shares' mean of the rows, so that equal rows are joined without an error.
    Router outputs that are no key stay. Raises as `replace_router`.
    """
    rows = sample.router_input.double()
    weight = _load(layer, weights, layer.router.tensor("weight")).double()
    known = next(iter(layer.router.tensors("bias")), None)
    bias = torch.zeros(len(weight), dtype=torch.float64) if known is None else _load(layer, weights, known).double()
    new_weight, new_bias = weight.clone(), bias.clone()
    features = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    gram = features.T @ features
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()))
    factor = torch.linalg.cholesky(gram)
    for output, members in groups.items():
        if list(members) == [output]:
            continue
        share = torch.tensor([1.0] * len(members) if shares is None else list(shares[output]), dtype=torch.float64)
        inside = list(members)
        logits = rows @ weight[inside].T + bias[inside]
        wanted = torch.logsumexp(logits + share.log(), dim=1)
        mean_weight = (share / share.sum()) @ weight[inside]
        # a bias of its own first: it is all that equal rows need
        mean_bias = (wanted - rows @ mean_weight).mean()
        residual = wanted - rows @ mean_weight - mean_bias
        change = torch.cholesky_solve((features.T @ residual)[:, None], factor)[:, 0]
        new_weight[output], new_bias[output] = mean_weight + change[:-1], mean_bias + change[-1]
    return replace_router(layer, weights, new_weight.float(), new_bias.float())


def _load(layer: MoeLayer, weights: WeightContext, value: Value) -> torch.Tensor:
    op = value.defining_op
    assert isinstance(op, WeightOp), layer.name
    return weights.load(op.source)
