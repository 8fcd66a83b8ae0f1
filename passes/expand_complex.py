"""Complex numbers as pairs of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp
from moec.ir import Block, DenseConstant, DType, Operation, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import made_by, shape, tensor
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, register_pass


@register_pass("expand-complex")
@dataclass(frozen=True)
class ExpandComplex(Pass):
    """Replaces every complex tensor by two real ones, its real and its imaginary part.

    Either all complex tensors of a block go or, where an operation has no such form, none and the reason is given.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    expanded = Statistic("operations on complex tensors replaced")

    def run(self, op: Operation, context: PassContext) -> None:
        for region in op.regions:
            obstacle = _obstacle(region.block)
            if obstacle is not None:
                context.refuse(obstacle, "it works on complex tensors and has no form for real ones", self.pass_name)
            else:
                context.count(self.expanded, _Expansion().run(region.block))
            for nested in region.block:
                self.run(nested, context)


@dataclass(frozen=True)
class _Parts:
    """A complex value: two real ones of its shape."""

    real: Value
    imaginary: Value


# What moves elements or multiplies them by a real number does so with each part.
_ON_EACH_PART = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
        "squeeze.default", "permute.default", "transpose.int", "t.default", "expand.default", "slice.Tensor",
        "select.int", "index.Tensor", "index_select.default", "cat.default", "stack.default", "repeat.default",
        "split_with_sizes.default", "split.Tensor", "chunk.default", "unbind.int", "clone.default", "neg.default",
        "mul.Scalar", "div.Scalar", "sum.dim_IntList", "mean.dim", "add.Tensor", "sub.Tensor", "flip.default",
    )
)  # fmt: skip


def _is_complex(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype is DType.C64


def _touches_complex(op: Operation) -> bool:
    return any(_is_complex(value) for value in (*op.operands, *op.results))


def _obstacle(block: Block) -> Operation | None:
    """The first operation on complex tensors that cannot be replaced."""
    for op in block:
        if not _touches_complex(op) or isinstance(op, ConstantOp):
            continue
        if not isinstance(op, AtenOp) or not (op.name in _ON_EACH_PART or op.name in _SPECIAL):
            return op
        mixed = any(_is_complex(value) for value in op.operands) and not all(
            _is_complex(value) for value in op.operands
        )
        if mixed and op.name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.cat.default", "aten.stack.default"):
            return op
        if op.name == "aten.div.Tensor" and _is_complex(op.tensor("other")):
            return op
        if isinstance(op.attributes.get("other"), complex):
            return op
    return None


@dataclass
class _Expansion:
    parts: dict[Value, _Parts] = field(default_factory=dict)

    def run(self, block: Block) -> int:
        """Replaces all operations on complex tensors; gives their number."""
        replaced = [op for op in block if _touches_complex(op)]
        for op in replaced:
            self._expand(op)
        for op in reversed(replaced):
            op.erase()
        return len(replaced)

    def _expand(self, op: Operation) -> None:
        def insert(new: Operation) -> None:
            new.location = op.location
            new.insert_before(op)

        build = Builder(insert)
        if isinstance(op, ConstantOp):
            self.parts[op.value] = _split_constant(op, build)
            return
        assert isinstance(op, AtenOp)
        special = _SPECIAL.get(op.name)
        if special is None:
            copies = [self._copy(op, build, imaginary) for imaginary in (False, True)]
            for result, real, imaginary in zip(op.results, copies[0].results, copies[1].results, strict=True):
                self.parts[result] = _Parts(real, imaginary)
            return
        found = special(self, op, build)
        if isinstance(found, _Parts):
            self.parts[op.result] = found
        else:
            op.result.replace_all_uses_with(found)

    def _copy(self, op: AtenOp, build: Builder, imaginary: bool) -> Operation:
        """The same operation on one of the parts."""
        operands = []
        for value in op.operands:
            parts = self.parts.get(value)
            operands.append(value if parts is None else parts.imaginary if imaginary else parts.real)
        kinds = [tensor(result).with_dtype(DType.F32) for result in op.results]
        copy = Operation.create(op.name, operands, kinds, op.attributes)
        build.insert(copy)
        return copy

    # -- operations with a form of their own --------------------

    def from_pairs(self, op: AtenOp, build: Builder) -> _Parts:
        """view_as_complex"""
        pairs = op.tensor("self")
        kind = TensorType(shape(pairs)[:-1], tensor(pairs).dtype)
        first, second = (build.aten("select.int", {"self": pairs}, kind, dim=-1, index=index) for index in (0, 1))
        return _Parts(first, second)

    def to_pairs(self, op: AtenOp, build: Builder) -> Value:
        """view_as_real"""
        parts = self.parts[op.tensor("self")]
        last = len(shape(parts.real))
        return build.concat([build.unsqueeze(parts.real, last), build.unsqueeze(parts.imaginary, last)], last)

    def polar(self, op: AtenOp, build: Builder) -> _Parts:
        """polar"""
        length, angle = op.tensor("abs"), op.tensor("angle")
        cos = build.aten("cos.default", {"self": angle}, tensor(angle))
        sin = build.aten("sin.default", {"self": angle}, tensor(angle))
        if _is_one(length) and shape(length) == shape(angle):
            return _Parts(cos, sin)
        return _Parts(_product(build, op, length, cos), _product(build, op, length, sin))

    def from_parts(self, op: AtenOp, build: Builder) -> _Parts:
        """complex"""
        kind = tensor(op.result).shape
        return _Parts(build.expand(op.tensor("real"), kind), build.expand(op.tensor("imag"), kind))

    def multiply(self, op: AtenOp, build: Builder) -> _Parts:
        """mul.Tensor"""
        one, other = (self.parts.get(op.tensor(name)) for name in ("self", "other"))
        if one is None or other is None:
            parts, factor = (one, op.tensor("other")) if one is not None else (other, op.tensor("self"))
            assert parts is not None
            return _Parts(_product(build, op, parts.real, factor), _product(build, op, parts.imaginary, factor))
        kind = tensor(op.result).with_dtype(DType.F32)
        squares = (_product(build, op, one.real, other.real), _product(build, op, one.imaginary, other.imaginary))
        cross = (_product(build, op, one.real, other.imaginary), _product(build, op, one.imaginary, other.real))
        return _Parts(
            build.aten("sub.Tensor", {"self": squares[0], "other": squares[1]}, kind),
            build.aten("add.Tensor", {"self": cross[0], "other": cross[1]}, kind),
        )

    def divide(self, op: AtenOp, build: Builder) -> _Parts:
        """div.Tensor by a real tensor"""
        parts, divisor = self.parts[op.tensor("self")], op.tensor("other")
        kind = tensor(op.result).with_dtype(DType.F32)
        quotients = [
            build.aten("div.Tensor", {"self": part, "other": divisor}, kind) for part in (parts.real, parts.imaginary)
        ]
        return _Parts(quotients[0], quotients[1])

    def conjugate(self, op: AtenOp, build: Builder) -> _Parts:
        """conj and its spellings"""
        parts = self.parts[op.tensor("self")]
        negated = build.aten("neg.default", {"self": parts.imaginary}, tensor(parts.imaginary))
        return _Parts(parts.real, negated)

    def same(self, op: AtenOp, build: Builder) -> _Parts:
        """A copy, or the end of a lazy conjugation"""
        return self.parts[op.operands[0]]

    def real(self, op: AtenOp, build: Builder) -> Value:
        """real"""
        return self.parts[op.operands[0]].real

    def imaginary(self, op: AtenOp, build: Builder) -> Value:
        """imag"""
        return self.parts[op.operands[0]].imaginary

    def length(self, op: AtenOp, build: Builder) -> Value:
        """abs"""
        parts = self.parts[op.tensor("self")]
        kind = tensor(op.result)
        squares = [_product(build, op, part, part) for part in (parts.real, parts.imaginary)]
        total = build.aten("add.Tensor", {"self": squares[0], "other": squares[1]}, kind)
        return build.aten("sqrt.default", {"self": total}, kind)


def _is_one(value: Value) -> bool:
    filled = made_by(value, "ones_like.default", "ones.default", "full_like.default", "full.default")
    return filled is not None and ("ones" in filled.name or filled.argument("fill_value") == 1)


def _product(build: Builder, op: AtenOp, one: Value, other: Value) -> Value:
    kind = tensor(op.result).with_dtype(DType.F32)
    return build.aten("mul.Tensor", {"self": one, "other": other}, kind)


def _split_constant(op: ConstantOp, build: Builder) -> _Parts:
    """The parts of a constant, whose elements lie in memory as pairs of f32."""
    data, kind = op.data.data, tensor(op.value).with_dtype(DType.F32)
    parts = []
    for offset in (0, 4):
        elements = b"".join(data[start + offset : start + offset + 4] for start in range(0, len(data), 8))
        parts.append(build.insert(ConstantOp(result_types=[kind], data=DenseConstant(elements))))
    return _Parts(parts[0], parts[1])


_SPECIAL: dict[str, Callable[[_Expansion, AtenOp, Builder], _Parts | Value]] = {
    f"aten.{name}": function
    for name, function in (
        ("view_as_complex.default", _Expansion.from_pairs),
        ("view_as_complex_copy.default", _Expansion.from_pairs),
        ("view_as_real.default", _Expansion.to_pairs),
        ("view_as_real_copy.default", _Expansion.to_pairs),
        ("polar.default", _Expansion.polar),
        ("complex.default", _Expansion.from_parts),
        ("mul.Tensor", _Expansion.multiply),
        ("div.Tensor", _Expansion.divide),
        ("conj.default", _Expansion.conjugate),
        ("_conj.default", _Expansion.conjugate),
        ("conj_physical.default", _Expansion.conjugate),
        ("resolve_conj.default", _Expansion.same),
        ("_to_copy.default", _Expansion.same),
        ("real.default", _Expansion.real),
        ("imag.default", _Expansion.imaginary),
        ("abs.default", _Expansion.length),
    )
}
