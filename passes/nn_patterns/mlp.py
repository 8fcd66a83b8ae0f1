"""Dense feed-forward blocks: `nn.mlp` with a region that computes one token, as the body of an expert does.

A block is recognised by what it is: a projection of something that is computed token by token from projections of one
input, with an activation or a product in between, and whose parts nobody else reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.moe import YieldOp
from moec.dialects.nn import TOKENS, LayerNormOp, MLPOp, RMSNormOp
from moec.ir import Block, BlockArgument, Operation, Region, TensorType, Value
from moec.passes.matching import is_last_axis, is_view, shape, tensor
from moec.rewrite import Rewriter, rewrite

_ACTIVATIONS = frozenset(
    f"aten.{name}.default"
    for name in (
        "silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "elu", "leaky_relu", "hardtanh", "hardswish",
        "hardsigmoid", "mish", "relu6", "selu", "celu", "exp", "expm1", "erf",
    )
)  # fmt: skip
_ELEMENTWISE = _ACTIVATIONS | frozenset(
    f"aten.{name}"
    for name in (
        "mul.Tensor", "mul.Scalar", "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar",
        "div.Tensor", "div.Scalar", "neg.default", "pow.Tensor_Scalar", "square.default", "abs.default", "sign.default",
        "clamp.default", "clamp_min.default", "clamp_max.default", "minimum.default", "maximum.default",
        "reciprocal.default", "where.self", "gt.Scalar", "lt.Scalar", "ge.Scalar", "le.Scalar", "log1p.default",
    )
)  # fmt: skip
_SPLITS = frozenset({"aten.split_with_sizes.default", "aten.split.Tensor", "aten.chunk.default", "aten.slice.Tensor"})
_PROJECTIONS = frozenset({"aten.linear.default", "aten.addmm.default", "aten.mm.default", "aten.matmul.default"})
# Larger blocks are no feed-forward blocks; the limit keeps the search from walking a whole model.
_MOST_OPERATIONS = 64


@rewrite(*sorted(_PROJECTIONS))
def raise_mlp(op: AtenOp, rewriter: Rewriter) -> bool:
    """down(activation(gate(x)) * up(x)), down(activation(up(x))) and the like ==> mlp(x)"""
    if not _is_projection(op):
        return False
    search = _Search(op)
    if not search.collect(_projected(op)) or not search.inner_projections or not search.activated:
        return False
    x = search.input
    if x is None or shape(x)[-1] != shape(op.result)[-1] or tensor(x).dtype is not tensor(op.result).dtype:
        return False
    outside = search.leaking()
    if outside is not None:
        return rewriter.refuse(op, f"{outside.name} inside the feed-forward block is used outside of it, too")
    region, weights = search.body(op)
    mlp = rewriter.insert(MLPOp(x, weights, regions=[region]))
    result: Value = mlp.y
    if shape(x) != shape(op.result):
        view = aten.build("view.default", {"self": result}, (op.result.type,), size=shape(op.result))
        result = rewriter.insert(view).result
    rewriter.replace(op, result)
    return True


def _is_projection(op: Operation) -> bool:
    """Whether `op` multiplies the last axis by a fixed matrix."""
    if not isinstance(op, AtenOp) or op.name not in _PROJECTIONS:
        return False
    fixed = [value for value in op.operands if value is not _projected(op)]
    if op.name == "aten.matmul.default" and len(shape(op.tensor("other"))) != 2:
        return False
    if op.name == "aten.addmm.default" and (op.argument("beta"), op.argument("alpha")) != (1, 1):
        return False
    return all(_is_fixed(value) for value in fixed)


def _projected(op: AtenOp) -> Value:
    return op.tensor({"aten.linear.default": "input", "aten.addmm.default": "mat1"}.get(op.name, "self"))


def _is_fixed(value: Value) -> bool:
    """Whether a value does not depend on any token: a weight or constant, or such a one with its axes permuted."""
    op = value.defining_op
    if isinstance(op, AtenOp) and op.name in ("aten.permute.default", "aten.t.default", "aten.transpose.int"):
        op = op.operands[0].defining_op
    return isinstance(op, WeightOp | ConstantOp) or (op is not None and op.name == "aten.scalar_tensor.default")


@dataclass
class _Search:
    """Walks from the input of the last projection back to the input of the first ones."""

    last: AtenOp
    found: dict[Operation, None] = field(default_factory=dict)
    inner_projections: int = 0
    activated: bool = False
    input: Value | None = None

    def collect(self, value: Value) -> bool:
        """Adds what computes `value`; False where it is not computed token by token from one input."""
        op = value.defining_op
        if op is None or op.parent is not self.last.parent:
            return False
        if op in self.found:
            return True
        if len(self.found) >= _MOST_OPERATIONS:
            return False
        self.found[op] = None
        if _is_projection(op):
            assert isinstance(op, AtenOp)
            self.inner_projections += 1
            return self._is_input(_projected(op))
        if isinstance(op, RMSNormOp | LayerNormOp):
            return self.collect(op.x) and all(_is_fixed(other) for other in op.operands[1:])
        if not isinstance(op, AtenOp):
            return False
        if is_view(value) is not None:
            return shape(value)[-1] == shape(op.operands[0])[-1] and self.collect(op.operands[0])
        if op.name in _SPLITS:
            return is_last_axis(op) and self.collect(op.operands[0])
        if op.name not in _ELEMENTWISE:
            return False
        moving = [operand for operand in op.operands if not _is_fixed(operand)]
        still = [operand for operand in op.operands if _is_fixed(operand)]
        if any(len(shape(operand)) > 1 for operand in still) or any(
            shape(operand) != shape(value) for operand in moving
        ):
            return False
        self.activated |= op.name in _ACTIVATIONS or (op.name == "aten.mul.Tensor" and len(moving) == 2)
        return all(self.collect(operand) for operand in moving)

    def _is_input(self, value: Value) -> bool:
        source = _token_source(value)
        if self.input is None:
            self.input = value
        return _token_source(self.input) is source

    def leaking(self) -> Operation | None:
        """An operation of the block whose result is used outside of it."""
        inside = {*self.found, self.last}
        for op in self.found:
            if any(user not in inside for result in op.results for user in result.users):
                return op
        return None

    def body(self, last: AtenOp) -> tuple[Region, list[Value]]:
        """The region, and the values of its arguments behind the tokens."""
        assert self.input is not None
        ordered = [*sorted(self.found, key=_Order(last)), last]
        weights = list(dict.fromkeys(w for op in ordered for w in _fixed_operands(op)))
        tokens = TensorType((TOKENS, shape(self.input)[-1]), tensor(self.input).dtype)
        block = Block([tokens, *[weight.type for weight in weights]])
        mapping: dict[Value, Value] = dict(zip(weights, block.arguments[1:], strict=True))
        for op in ordered:
            if _is_projection(op):
                assert isinstance(op, AtenOp)
                if op is not last:
                    mapping[_projected(op)] = block.arguments[0]
                mapping[op.result] = _append_linear(block, op, mapping)
            elif is_view(op.results[0]) is not None:
                mapping[op.results[0]] = mapping[op.operands[0]]
            else:
                _append_copy(block, op, mapping)
        block.append(YieldOp([mapping[last.result]], result_types=[], location=last.location))
        return Region(block), weights


class _Order:
    """Sorts operations of one block as they stand in it, by walking back from the last one once."""

    def __init__(self, last: Operation) -> None:
        self._last = last
        self._position: dict[Operation, int] = {}
        self._next: Operation | None = last.prev

    def __call__(self, op: Operation) -> int:
        while op not in self._position:
            assert self._next is not None
            self._position[self._next] = -len(self._position)
            self._next = self._next.prev
        return self._position[op]


def _token_source(value: Value) -> Value:
    """What `value` is a view of with the same last axis."""
    while (view := is_view(value)) is not None and shape(view.operands[0])[-1] == shape(value)[-1]:
        value = view.operands[0]
    return value


def _fixed_operands(op: Operation) -> list[Value]:
    if is_view(op.results[0]) is not None:
        return []
    return [_unpermuted(value)[0] for value in op.operands if _is_fixed(value)]


def _unpermuted(value: Value) -> tuple[Value, AtenOp | None]:
    op = value.defining_op
    if isinstance(op, AtenOp) and op.operand_count:
        return op.operands[0], op
    return value, None


def _argument(block: Block, value: Value, mapping: dict[Value, Value]) -> Value:
    """The body's value of a fixed operand; a permutation of a weight is repeated in the body."""
    weight, permutation = _unpermuted(value)
    if permutation is None:
        return mapping[weight]
    copy = permutation.clone({weight: mapping[weight]})
    block.append(copy)
    return copy.results[0]


def _append_linear(block: Block, op: AtenOp, mapping: dict[Value, Value]) -> Value:
    """A projection as `linear`, whatever its spelling."""
    tokens = mapping[_projected(op)]
    bias: Value | None = None
    if op.name == "aten.linear.default":
        matrix = _argument(block, op.tensor("weight"), mapping)
        biases = op.tensors("bias")
        bias = _argument(block, biases[0], mapping) if biases else None
    else:
        given = op.tensor("mat2" if op.tensors("mat2") else "other")
        biases = op.tensors("self") if op.name == "aten.addmm.default" else ()
        bias = _argument(block, biases[0], mapping) if biases else None
        matrix = _transposed(block, _argument(block, given, mapping))
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": tokens, "weight": matrix}
    if bias is not None:
        tensors["bias"] = bias
    kind = TensorType((TOKENS, shape(matrix)[0]), tensor(op.result).dtype)
    linear = aten.build("linear.default", tensors, (kind,), op.location)
    block.append(linear)
    return linear.result


def _transposed(block: Block, matrix: Value) -> Value:
    made = matrix.defining_op
    if made is not None and made.has_uses is False and isinstance(matrix, BlockArgument) is False:
        source = made.operands[0]
        made.erase()
        return source
    rows, columns = shape(matrix)
    kind = TensorType((columns, rows), tensor(matrix).dtype)
    permute = aten.build("permute.default", {"self": matrix}, (kind,), dims=(1, 0))
    block.append(permute)
    return permute.result


def _append_copy(block: Block, op: Operation, mapping: dict[Value, Value]) -> None:
    """The same operation on [tokens, channels]."""
    copy = Operation.create(
        op.name,
        [_argument(block, value, mapping) if _is_fixed(value) else mapping[value] for value in op.operands],
        [_on_tokens(result.type) for result in op.results],
        {**op.attributes, **({"dim": -1} if op.name in _SPLITS else {})},
        [],
        op.location,
    )
    block.append(copy)
    mapping.update(zip(op.results, copy.results, strict=True))


def _on_tokens(kind: object) -> TensorType:
    assert isinstance(kind, TensorType)
    return TensorType((TOKENS, kind.shape[-1]), kind.dtype)


MLP_PATTERNS = (raise_mlp,)
