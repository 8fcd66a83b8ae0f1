"""Dense blocks that every token has beside its routed experts: shared experts, with the weight 1 or a sigmoid gate."""

from __future__ import annotations

from dataclasses import dataclass

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.dialects.nn import MLPOp
from moec.experts import DenseLayer, MoeLayer
from moec.ir import TensorType, Value

_VIEWS = frozenset({"aten.view.default", "aten._to_copy.default", "aten.clone.default", "aten.alias.default"})


@dataclass(frozen=True)
class SharedExpert:
    """One `nn.mlp` whose result is added to that of the experts; `gate` is the weight [1, H] of its sigmoid gate."""

    dense: DenseLayer
    gate: WeightOp | None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the model's modules, or of parts of them, that it stands for."""
        weight = () if self.gate is None else (str(self.gate.weight_name).rpartition(".")[0],)
        return (self.dense.name, *weight)


@dataclass(frozen=True)
class Block:
    """A layer with experts and its shared ones. `result` is the value that all of them together give."""

    layer: MoeLayer
    shared: tuple[SharedExpert, ...]
    result: Value


def block_of(layer: MoeLayer) -> Block:
    """The layer with the shared experts that are added to it, one sum after another."""
    result: Value = layer.experts.y
    found: list[SharedExpert] = []
    while True:
        total = _seen(result)
        op = _only_user(total)
        if op is None or op.name != "aten.add.Tensor" or op.argument("alpha") != 1:
            return Block(layer, tuple(found), result)
        other = op.operands[1] if op.operands[0] is total else op.operands[0]
        shared = _shared(_origin(other), layer, len(found))
        if shared is None:
            return Block(layer, tuple(found), result)
        found.append(shared)
        result = op.results[0]


def same_rows(one: Value, other: Value) -> bool:
    """Whether two values are the same numbers in the same order of rows."""
    return _origin(one) is _origin(other)


def _shared(value: Value, layer: MoeLayer, number: int) -> SharedExpert | None:
    op, gate = value.defining_op, None
    if isinstance(op, AtenOp) and op.name == "aten.mul.Tensor":
        sides = [_origin(operand) for operand in op.operands]
        sides.sort(key=lambda side: not isinstance(side.defining_op, MLPOp))
        gate = _gate(sides[1], layer)
        op = sides[0].defining_op
        if gate is None or not sides[0].has_one_use:
            return None
    if not isinstance(op, MLPOp) or not op.y.has_one_use or not same_rows(op.x, layer.experts.x):
        return None
    return SharedExpert(DenseLayer(op.location.name or f"{layer.name}.shared{number}", number, op), gate)


def _gate(value: Value, layer: MoeLayer) -> WeightOp | None:
    """The weight of sigmoid(linear(rows)), one number for a token."""
    op = value.defining_op
    if not isinstance(op, AtenOp) or op.name != "aten.sigmoid.default":
        return None
    linear = _origin(op.operands[0]).defining_op
    if not isinstance(linear, AtenOp) or linear.name != "aten.linear.default" or linear.tensors("bias"):
        return None
    weight = linear.tensor("weight").defining_op
    fits = _kind(linear.result).shape[-1] == 1 and same_rows(linear.tensor("input"), layer.experts.x)
    return weight if fits and isinstance(weight, WeightOp) else None


def _origin(value: Value) -> Value:
    op = value.defining_op
    while op is not None and op.name in _VIEWS and _kind(op.operands[0]).shape[-1] == _kind(value).shape[-1]:
        value = op.operands[0]
        op = value.defining_op
    return value


def _seen(value: Value) -> Value:
    """The value behind views that have no other readers."""
    op = _only_user(value)
    while op is not None and op.name in _VIEWS and _kind(op.results[0]).shape[-1] == _kind(value).shape[-1]:
        value = op.results[0]
        op = _only_user(value)
    return value


def _only_user(value: Value) -> AtenOp | None:
    users = list(value.users)
    return users[0] if len(users) == 1 and isinstance(users[0], AtenOp) else None


def _kind(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type
