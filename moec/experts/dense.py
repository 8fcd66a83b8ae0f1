"""Dense feed-forward blocks, and how one becomes a layer with experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moec.dialects import aten
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing, WeightFrom
from moec.dialects.nn import MLPOp
from moec.experts.bodies import Operand, build_body, operands_of
from moec.experts.edit import replace_experts
from moec.experts.expert import Constant, Expert, FeedForward
from moec.experts.layer import MoeLayer
from moec.experts.parts import erase_unused, new_weight, settle_names, store_tensor, tensor_of
from moec.experts.reading import UnreadableExpertError, load_body
from moec.experts.rows import seen_through
from moec.ir import DimExpr, Operation, TensorType, Value
from moec.weights.context import WeightContext
from moec.weights.expression import Expression


@dataclass(frozen=True)
class DenseLayer:
    """One `nn.mlp`. `name` is unique in the module, `index` counts its dense layers."""

    name: str
    index: int
    op: MLPOp

    @property
    def hidden_size(self) -> int:
        """H."""
        size = tensor_of(self.op.x).shape[-1]
        assert isinstance(size, int)
        return size

    @property
    def is_beside_experts(self) -> bool:
        """Whether it stands beside routed experts as a shared one: both read the same rows."""
        return self.experts_beside is not None

    @property
    def experts_beside(self) -> ExpertsOp | None:
        """The routed experts that read the same rows."""
        source = self.op.x
        while source.defining_op is not None and source.defining_op.name == _VIEW:
            source = source.defining_op.operands[0]
        return next((user for user in _readers(source) if isinstance(user, ExpertsOp)), None)

    @property
    def is_weighted(self) -> bool:
        """Whether its output is multiplied by something, such as a gate, before it is added to others."""
        return any(user.name.startswith("aten.mul.") for user in _readers(self.op.y))


def _readers(value: Value) -> Iterator[Operation]:
    """What reads a value, other shapes of it included."""
    for user in value.users:
        if user.name == _VIEW:
            for result in user.results:
                yield from _readers(result)
        else:
            yield user


_VIEW = "aten.view.default"


def find_dense_layers(root: Operation) -> tuple[DenseLayer, ...]:
    """The dense feed-forward blocks of a module in order."""
    ops = [op for op in root.walk() if isinstance(op, MLPOp)]
    names = [op.location.name or "mlp" for op in ops]
    return tuple(
        DenseLayer(name if names.count(name) == 1 else f"{name}#{names[: number + 1].count(name)}", number, op)
        for number, (op, name) in enumerate(zip(ops, names, strict=True))
    )


def load_dense(layer: DenseLayer, weights: WeightContext, dtype: torch.dtype = torch.float32) -> FeedForward:
    """The block with its tensors in `dtype`; raises UnreadableExpertError where it is no feed-forward block."""
    block = layer.op.regions[0].block
    found = load_body(layer.name, block, [(value, None) for value in layer.op.weights], weights, dtype=dtype)
    if not isinstance(found, FeedForward):
        raise UnreadableExpertError("this block has no hidden activations", where=layer.name)
    return found


def replace_dense(layer: DenseLayer, weights: WeightContext, block: FeedForward) -> DenseLayer:
    """Puts another block in the place of a dense one; raises UsageError where there is no store."""
    old = layer.op
    new = _block(layer, weights, block, layer.name)
    new.location = old.location
    new.insert_before(old)
    old.y.replace_all_uses_with(new.y)
    erase_unused(old)
    settle_names(new)
    return DenseLayer(layer.name, layer.index, new)


def make_sparse(
    layer: DenseLayer,
    weights: WeightContext,
    experts: Sequence[Expert],
    shared: FeedForward | None = None,
    bias: torch.Tensor | None = None,
) -> MoeLayer:
    """Replaces a dense block by experts, all of which are chosen with gate 1, and a dense block `shared` beside them.

    The router is a linear map of zeros: which experts a token chooses is decided by whoever changes it and the number
    of choices. `bias` [H] is added to each token once, whichever experts it chooses.
    Raises UsageError where there is no store.
    """
    old = layer.op
    kind = tensor_of(old.x)
    tokens: int | DimExpr = 1
    for size in kind.shape[:-1]:
        tokens = tokens * size
    hidden, count = layer.hidden_size, len(experts)

    def insert(op: Operation) -> Value:
        op.location = old.location
        op.insert_before(old)
        return op.results[0]

    rows: Value = old.x
    flat = TensorType((tokens, hidden), kind.dtype)
    if kind.rank != 2:
        rows = insert(aten.build("view.default", {"self": rows}, (flat,), size=flat.shape))
    zeros = store_tensor(weights, torch.zeros(count, hidden))
    zero_rows = new_weight(old, f"{layer.name}.router.weight", zeros, (count, hidden))
    logits = TensorType((tokens, count), kind.dtype)
    router = aten.build("linear.default", {"input": rows, "weight": zero_rows}, (logits,))
    insert(router)
    route = RouteOp(router.result, routing=Routing(k=count, weight_from=WeightFrom.ONE))
    insert(route)
    # experts that give nothing, until the edit below puts the real ones in their place
    nothing = ExpertsOp(
        rows,
        route.ids,
        route.gates,
        [zero_rows],
        regions=[build_body(Constant(torch.zeros(hidden)), hidden)],
        stored=tuple(range(count)),
        classes=(ExpertClass(tuple(range(count)), 1),),
    )
    result = insert(nothing)
    if kind.rank != 2:
        result = insert(aten.build("view.default", {"self": result}, (kind,), size=kind.shape))
    if shared is not None:
        beside = insert(_block(layer, weights, shared, f"{layer.name}.shared"))
        result = insert(aten.build("add.Tensor", {"self": beside, "other": result}, (kind,)))
    if bias is not None:
        name = f"{layer.name}.bias"
        added = new_weight(old, name, store_tensor(weights, bias), (hidden,))
        result = insert(aten.build("add.Tensor", {"self": result, "other": added}, (kind,)))
    old.y.replace_all_uses_with(result)
    made = replace_experts(MoeLayer(layer.name, layer.index, route, nothing, router), weights, dict(enumerate(experts)))
    erase_unused(old)
    settle_names(made.experts)
    return made


def _block(layer: DenseLayer, weights: WeightContext, block: FeedForward, name: str) -> MLPOp:
    """The feed-forward block as an operation; `name` begins the names of its weights."""
    given = [
        new_weight(
            layer.op,
            f"{name}.{item.name}",
            _source_of(block, item, weights),
            tuple(item.tensor.shape),
            item.dtype,
        )
        for item in operands_of(block)
    ]
    return MLPOp(layer.op.x, given, regions=[build_body(block, layer.hidden_size)])


def _source_of(block: FeedForward, operand: Operand, weights: WeightContext) -> Expression:
    """Where a tensor of the block lies: in the source where it was loaded from there, else in the store."""
    known = next((item for item in block.loaded if item.holds(operand.tensor) and item.row is None), None)
    if known is None:
        return store_tensor(weights, operand.tensor, operand.dtype)
    return seen_through(known.stack, known.view, 0, lambda source: weights.shape_dtype(source)[0])
