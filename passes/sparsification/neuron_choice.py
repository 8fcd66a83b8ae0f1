"""Which neurons of a dense block a token uses: scores, thresholds, and the operations that mask the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.dialects import aten
from moec.dialects.nn import TOKENS
from moec.experts import FeedForward
from moec.experts.bodies import operands_of
from moec.experts.dense import DenseLayer
from moec.experts.parts import new_weight, store_tensor
from moec.ir import DType, Operation, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import shape
from moec.passes.norm_folding.linear_maps import add_operand
from moec.passes.router_init.solutions import least_squares
from moec.weights.context import WeightContext


@dataclass(frozen=True)
class Predictor:
    """scores = left (right x) + bias: `left` [m, r], `right` [r, H], `bias` [m]."""

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, m] from rows [n, H]."""
        found: torch.Tensor = (rows.double() @ self.right.T) @ self.left.T + self.bias
        return found


def neuron_scores(block: FeedForward, rows: torch.Tensor) -> torch.Tensor:
    """What each neuron gives to each row: |h_j| ||D_j||, float64 [n, m] for rows [n, H]."""
    norms: torch.Tensor = block.down.dense().norm(dim=0)
    return (block.hidden_activations(rows).abs() * norms).double()


def standard_scores(block: FeedForward, rows: torch.Tensor) -> torch.Tensor:
    """How many standard deviations each gate lies above the mean of its row's gates, float64 [n, m]."""
    gates = (block.up if block.gate is None else block.gate).apply(rows).double()
    return (gates - gates.mean(1, keepdim=True)) / gates.std(1, keepdim=True, correction=0)


def fit_predictor(rows: torch.Tensor, scores: torch.Tensor, rank: int, ridge: float) -> Predictor:
    """The map of a given rank that is nearest to `scores` [n, m] on `rows` [n, H]: reduced-rank regression.

    Of the least-squares map W it keeps the directions of the fitted values: W = V V^T W, with V the first principal
    axes of X W^T (Izenman 1975).
    """
    weight, _ = least_squares(rows, scores, ridge)
    fitted = (rows.double() - rows.double().mean(0)) @ weight.T
    _, axes = torch.linalg.eigh(fitted.T @ fitted)
    best = axes[:, -rank:]
    right = best.T @ weight
    # the mean of the scores stays what it is
    return Predictor(best, right, scores.mean(0) - best @ (right @ rows.double().mean(0)))


def mask_best(
    layer: DenseLayer, block: FeedForward, weights: WeightContext, count: int, predictor: Predictor | None
) -> None:
    """Multiplies all but the `count` neurons of largest score by zero, in a canonical body."""
    body = _Body(layer, block)
    hidden, last = body.hidden()
    build = Builder(lambda op: op.insert_before(last))
    if predictor is None:
        norms = body.add(weights, "norms", block.down.dense().norm(dim=0))
        size = build.aten("abs.default", {"self": hidden}, body.kind)
        scores = build.aten("mul.Tensor", {"self": size, "other": norms}, body.kind)
    else:
        right = body.add(weights, "predictor.right", predictor.right)
        left = body.add(weights, "predictor.left", predictor.left)
        bias = body.add(weights, "predictor.bias", predictor.bias)
        narrow = TensorType((TOKENS, len(predictor.right)), DType.F32)
        inner = build.aten("linear.default", {"input": body.rows, "weight": right}, narrow)
        scores = build.aten("linear.default", {"input": inner, "weight": left, "bias": bias}, body.kind)
    chosen = aten.build(
        "topk.default",
        {"self": scores},
        (TensorType((TOKENS, count), DType.F32), TensorType((TOKENS, count), DType.I64)),
        k=count,
    )
    build.insert(chosen)
    zeros = build.aten("zeros_like.default", {"self": hidden}, body.kind)
    tensors: dict[str, Value | tuple[Value, ...]] = {"self": zeros, "index": chosen.results[1]}
    mask = build.aten("scatter.value", tensors, body.kind, dim=1, value=1.0)
    last.set_operand(0, build.aten("mul.Tensor", {"self": hidden, "other": mask}, body.kind))


def mask_statistically(layer: DenseLayer, block: FeedForward, z: float) -> None:
    """Sets neurons to zero whose gate is not above mean + z deviations, in a canonical body."""
    body = _Body(layer, block)
    gate = body.gate()
    hidden, last = body.hidden()
    build = Builder(lambda op: op.insert_before(last))
    limit = _threshold(build, gate, z)
    flags = TensorType(body.kind.shape, DType.I1)
    mask = build.aten("gt.Tensor", {"self": gate, "other": limit}, flags)
    kept = build.aten("where.ScalarOther", {"condition": mask, "self": hidden}, body.kind, other=0.0)
    last.set_operand(0, kept)


def soft_threshold(layer: DenseLayer, block: FeedForward, z: float) -> None:
    """Replaces the gate g by relu(g - mean - z deviations), in a canonical body."""
    body = _Body(layer, block)
    gate = body.gate()
    maker = gate.defining_op
    assert maker is not None and maker.next is not None
    following = maker.next
    readers = list(gate.uses)
    build = Builder(lambda op: op.insert_before(following))
    lowered = build.aten("sub.Tensor", {"self": gate, "other": _threshold(build, gate, z)}, body.kind)
    result = build.aten("relu.default", {"self": lowered}, body.kind)
    for user, position in readers:
        user.set_operand(position, result)


def _threshold(build: Builder, gate: Value, z: float) -> Value:
    """mean + z deviations of each row [tokens, 1]."""
    one = TensorType((TOKENS, 1), DType.F32)
    mean = build.aten("mean.dim", {"self": gate}, one, dim=(-1,), keepdim=True)
    variance = build.aten("var.correction", {"self": gate}, one, dim=(-1,), correction=0, keepdim=True)
    deviation = build.aten("sqrt.default", {"self": variance}, one)
    return build.aten("add.Tensor", {"self": mean, "other": deviation}, one, alpha=z)


class _Body:
    """The canonical body of a dense block, and where its values are."""

    def __init__(self, layer: DenseLayer, block: FeedForward) -> None:
        self._layer = layer
        self._block = block
        self.kind = TensorType((TOKENS, block.width), DType.F32)

    @property
    def rows(self) -> Value:
        """What the body computes on [tokens, H]."""
        return self._layer.op.regions[0].block.arguments[0]

    def hidden(self) -> tuple[Value, Operation]:
        """(hidden activations [tokens, m], the operation that multiplies them by down)."""
        op = self._reader("down", first=True)
        return op.operands[0], op

    def gate(self) -> Value:
        """What the activation is applied to [tokens, m]."""
        return self._reader("up" if self._block.gate is None else "gate", first=False).results[0]

    def add(self, weights: WeightContext, name: str, tensor: torch.Tensor) -> Value:
        """A new weight of the body."""
        op = self._layer.op
        source = store_tensor(weights, tensor)
        return add_operand(op, 0, new_weight(op, f"{self._layer.name}.{name}", source, tuple(tensor.shape)), False)

    def _reader(self, name: str, first: bool) -> Operation:
        """The product with a matrix; of a factored one the first or the last."""
        names = [item.name for item in operands_of(self._block)]
        wanted = name if name in names else f"{name}.{'right' if first else 'left'}"
        argument = self._layer.op.regions[0].block.arguments[1 + names.index(wanted)]
        (reader,) = argument.users
        assert shape(reader.results[0])[0] == TOKENS
        return reader
