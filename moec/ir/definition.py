"""Typed operation classes: descriptors name positions, the class is only a description.

    class RMSNorm(Op, name="nn.rms_norm", pure=True):
        x = Operand()
        weight = OptionalOperand()
        y = Result()
        epsilon = Attr(float)

        def infer(self) -> Sequence[Type]: ...

`RMSNorm(x, weight, epsilon=1e-6)` infers the result types; the verifier infers again and compares. A class with
optional or variadic operands carries `operandSegmentSizes`, as MLIR's generic form does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, overload

from moec.ir.attributes import is_attribute, struct_problem
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Operation, OpResult, Region, Value
from moec.ir.types import Type
from moec.ir.verifier import VerifyError

T = TypeVar("T")
_MISSING: Any = object()


class _OperandBase:
    variadic = False
    optional = False

    def __set_name__(self, owner: type[Op], name: str) -> None:
        self.index = len(owner.operand_specs)
        owner.operand_specs = (*owner.operand_specs, (name, self))


class Operand(_OperandBase):
    """One operand that is always there."""

    @overload
    def __get__(self, op: None, owner: type[Op]) -> Self: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> Value: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> Self | Value:
        return self if op is None else op.operand_segment(self.index)[0]


class OptionalOperand(_OperandBase):
    """One operand or none."""

    optional = True

    @overload
    def __get__(self, op: None, owner: type[Op]) -> Self: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> Value | None: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> Self | Value | None:
        if op is None:
            return self
        segment = op.operand_segment(self.index)
        return segment[0] if segment else None


class VariadicOperand(_OperandBase):
    """Any number of operands."""

    variadic = True

    @overload
    def __get__(self, op: None, owner: type[Op]) -> Self: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> tuple[Value, ...]: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> Self | tuple[Value, ...]:
        return self if op is None else op.operand_segment(self.index)


class Result:
    """One result."""

    def __set_name__(self, owner: type[Op], name: str) -> None:
        self.index = len(owner.result_specs)
        owner.result_specs = (*owner.result_specs, name)

    @overload
    def __get__(self, op: None, owner: type[Op]) -> Self: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> OpResult: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> Self | OpResult:
        return self if op is None else op.results[self.index]


class VariadicResult(Result):
    """All results from this position on; at most one, and last."""

    def __set_name__(self, owner: type[Op], name: str) -> None:
        super().__set_name__(owner, name)
        owner.variadic_result = True

    def __get__(self, op: Op | None, owner: type[Op]) -> Any:
        return self if op is None else op.results[self.index :]


class Attr(Generic[T]):
    """One attribute of a given Python type. An attribute equal to its default is not stored, so that text has one
    form."""

    def __init__(self, kind: type[T], default: T = _MISSING) -> None:
        self.kind = kind
        self.default = default

    def __set_name__(self, owner: type[Op], name: str) -> None:
        self.name = name
        owner.attribute_specs = {**owner.attribute_specs, name: self}

    @overload
    def __get__(self, op: None, owner: type[Op]) -> Self: ...
    @overload
    def __get__(self, op: Op, owner: type[Op]) -> T: ...
    def __get__(self, op: Op | None, owner: type[Op]) -> Self | T:
        if op is None:
            return self
        return cast(T, op.attributes.get(self.name, self.default))

    def __set__(self, op: Op, value: T) -> None:
        if value == self.default and type(value) is type(self.default):
            op.attributes.pop(self.name, None)
        else:
            op.attributes[self.name] = value

    def check(self, op: Op) -> None:
        """Raises VerifyError unless the attribute is there and of its type."""
        value = op.attributes.get(self.name, self.default)
        if value is _MISSING:
            raise VerifyError(f"{op.name} needs the attribute {self.name}: {self.kind.__name__}", op)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is int):
            raise VerifyError(f"{op.name}: {self.name} must be {self.kind.__name__}, found {value!r}", op)
        problem = struct_problem(value)
        if problem is not None:
            raise VerifyError(f"{op.name}: {problem}", op)


SEGMENTS = "operandSegmentSizes"


class Op(Operation):
    """Base of typed operations."""

    __slots__ = ()
    op_name: ClassVar[str] = ""
    operand_specs: ClassVar[tuple[tuple[str, _OperandBase], ...]] = ()
    result_specs: ClassVar[tuple[str, ...]] = ()
    variadic_result: ClassVar[bool] = False
    attribute_specs: ClassVar[Mapping[str, Attr[Any]]] = {}
    region_count: ClassVar[int | None] = 0
    open_attributes: ClassVar[bool] = False
    # a single flexible operand takes all values and needs no segment sizes
    _all_variadic: ClassVar[bool] = False
    _segmented: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        name: str = "",
        pure: bool = False,
        terminator: bool = False,
        regions: int | None = 0,
        isolated: bool = False,
        open_attributes: bool = False,
    ) -> None:
        """`regions=None` allows any number; an `isolated` operation's regions read nothing from outside of them;
        `open_attributes` allows attributes that have no descriptor."""
        super().__init_subclass__()
        cls.op_name, cls.pure, cls.terminator, cls.isolated = name, pure, terminator, isolated
        cls.region_count, cls.open_attributes = regions, open_attributes
        flexible = [spec for _, spec in cls.operand_specs if spec.optional or spec.variadic]
        cls._all_variadic = len(cls.operand_specs) == 1 and bool(flexible)
        cls._segmented = bool(flexible) and not cls._all_variadic
        if name:
            Operation.registry[name] = cls

    def __init__(
        self,
        *operands: Value | Sequence[Value] | None,
        result_types: Sequence[Type] | None = None,
        regions: Sequence[Region] = (),
        location: Location = UNKNOWN,
        **attributes: Any,
    ) -> None:
        """Operands follow the descriptors in order: a value, None for an absent optional one, a sequence for a
        variadic one.

        Result types are inferred unless given. Raises VerifyError where inference or an attribute does not fit.
        """
        given = (*operands, *[None] * (len(self.operand_specs) - len(operands)))
        if len(given) != len(self.operand_specs):
            raise VerifyError(f"{self.op_name} takes {len(self.operand_specs)} operands, got {len(operands)}")
        flat: list[Value] = []
        sizes: list[int] = []
        for item, (operand_name, position) in zip(given, self.operand_specs, strict=True):
            values = [] if item is None else [item] if isinstance(item, Value) else list(item)
            if not position.variadic and len(values) != 1 and not (position.optional and not values):
                raise VerifyError(f"{self.op_name} needs one value for {operand_name}")
            flat += values
            sizes.append(len(values))
        unknown = set(attributes) - set(self.attribute_specs)
        if unknown and not self.open_attributes:
            raise VerifyError(f"{self.op_name} has no attribute {sorted(unknown)[0]}")
        kept = {
            key: value
            for key, value in attributes.items()
            if key not in self.attribute_specs or not _is_default(value, self.attribute_specs[key].default)
        }
        if self._segmented:
            kept[SEGMENTS] = tuple(sizes)
        self._fill(self.op_name, flat, result_types or (), kept, regions, location)
        if result_types is None:
            for spec in self.attribute_specs.values():
                spec.check(self)
            inferred = self.infer()
            self.results = tuple([OpResult(kind, self, index) for index, kind in enumerate(inferred)])

    def operand_segment(self, index: int) -> tuple[Value, ...]:
        """The values at the descriptor position `index`."""
        if self._all_variadic:
            return tuple(self._operands)
        if not self._segmented:
            return (self._operands[index],)
        sizes: tuple[int, ...] = self.attributes[SEGMENTS]
        start = sum(sizes[:index])
        return tuple(self._operands[start : start + sizes[index]])

    def infer(self) -> Sequence[Type]:
        """Result types from operands, attributes and regions; raises VerifyError where they do not fit."""
        raise NotImplementedError(f"{self.op_name} needs explicit result types")

    def verify_op(self) -> None:
        self._verify_operands()
        for spec in self.attribute_specs.values():
            spec.check(self)
        for key, value in self.attributes.items():
            if key not in self.attribute_specs and not self.open_attributes and key != SEGMENTS:
                raise VerifyError(f"{self.name} has no attribute {key}", self)
            if not is_attribute(value):
                raise VerifyError(f"{self.name}: {key} is no attribute: {value!r}", self)
        if self.region_count is not None and len(self.regions) != self.region_count:
            raise VerifyError(f"{self.name} has {len(self.regions)} regions, expected {self.region_count}", self)
        self.verify_semantics()
        if type(self).infer is not Op.infer:
            inferred = tuple(self.infer())
            actual = tuple(result.type for result in self.results)
            if inferred != actual:
                expected = ", ".join(map(str, inferred))
                raise VerifyError(f"{self.name} gives ({', '.join(map(str, actual))}), expected ({expected})", self)

    def verify_semantics(self) -> None:
        """Further checks of one operation; raises VerifyError."""

    def _verify_operands(self) -> None:
        if self._segmented:
            sizes = self.attributes.get(SEGMENTS)
            well_formed = isinstance(sizes, tuple) and all(type(size) is int and size >= 0 for size in sizes)
            if not well_formed or len(sizes) != len(self.operand_specs) or sum(sizes) != len(self._operands):  # type: ignore[arg-type]
                raise VerifyError(f"{self.name}: {SEGMENTS} {sizes} does not fit {len(self._operands)} operands", self)
            for size, (operand_name, spec) in zip(sizes, self.operand_specs, strict=True):  # type: ignore[arg-type]
                if not spec.variadic and (size > 1 or (size == 0 and not spec.optional)):
                    raise VerifyError(f"{self.name} has {size} values for {operand_name}", self)
        elif not self._all_variadic and len(self._operands) != len(self.operand_specs):
            raise VerifyError(f"{self.name} takes {len(self.operand_specs)} operands, got {len(self._operands)}", self)
        fixed = len(self.result_specs) - (1 if self.variadic_result else 0)
        if len(self.results) < fixed or (not self.variadic_result and len(self.results) != fixed):
            raise VerifyError(f"{self.name} has {len(self.results)} results, expected {fixed}", self)


def _is_default(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)
