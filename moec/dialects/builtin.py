"""Module, function, weight and constant.

`func.func` and `func.return` are MLIR's own; `mlir-opt` refuses operations that it does not know inside its `builtin`
dialect, so weights and constants are `moec.*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from moec.ir.attributes import DenseConstant
from moec.ir.definition import Attr, Op, Result, VariadicOperand
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Block, BlockArgument, Operation, Region, Value
from moec.ir.types import FunctionType, TensorType, Type
from moec.ir.verifier import VerifyError

PAGE_ATTRIBUTE = "moec.page_bytes"
"""Attribute of a module: experts lie in a file of their own, each on pages of so many bytes."""

PREPACKED_ATTRIBUTE = "moec.prepacked"
"""Attribute of a module: the weights are also stored as ONNX Runtime packs them for the machine that compiles."""


class ModuleOp(Op, name="builtin.module", regions=1, open_attributes=True):
    """Holds functions. Its attributes are facts of the source model that survive in the text."""

    property_names = frozenset({"sym_name", "sym_visibility"})

    @classmethod
    def build(cls, ops: Sequence[Operation] = ()) -> Self:
        return cls(regions=[Region(Block(ops=ops))], result_types=[])

    @property
    def body(self) -> Block:
        return self.regions[0].block

    def functions(self) -> Iterator[FuncOp]:
        for op in self.body:
            if isinstance(op, FuncOp):
                yield op

    @property
    def main(self) -> FuncOp:
        """The function `main`; raises VerifyError where there is none."""
        for function in self.functions():
            if function.sym_name == "main":
                return function
        raise VerifyError("the module has no function main", self)

    def verify_semantics(self) -> None:
        names = [function.sym_name for function in self.functions()]
        for name in names:
            if names.count(name) > 1:
                raise VerifyError(f"two functions are named {name}", self)


class FuncOp(Op, name="func.func", regions=1, isolated=True, open_attributes=True):
    """A function. `arg_names` and `result_names` are the names that an artifact shows to its users."""

    property_names = frozenset({"sym_name", "function_type"})
    sym_name = Attr(str)
    function_type = Attr(FunctionType)
    arg_names = Attr(tuple, ())
    result_names = Attr(tuple, ())

    @classmethod
    def build(
        cls,
        name: str,
        argument_types: Sequence[Type],
        *,
        arg_names: Sequence[str] = (),
        location: Location = UNKNOWN,
    ) -> Self:
        """An empty function; `finish` closes it."""
        return cls(
            regions=[Region(Block(argument_types))],
            result_types=[],
            location=location,
            sym_name=name,
            function_type=FunctionType(tuple(argument_types), ()),
            arg_names=tuple(arg_names),
        )

    @property
    def body(self) -> Block:
        return self.regions[0].block

    @property
    def arguments(self) -> list[BlockArgument]:
        return self.body.arguments

    @property
    def return_op(self) -> Operation:
        return self.body.terminator

    def finish(self, values: Sequence[Value], result_names: Sequence[str] = ()) -> None:
        """Appends the return of `values`."""
        self.body.append(ReturnOp(list(values), result_types=[]))
        self.result_names = tuple(result_names)
        self.update_type()

    def update_type(self) -> None:
        """Brings `function_type` in line with the block and its return."""
        results = tuple(value.type for value in self.return_op.operands)
        self.function_type = FunctionType(tuple(argument.type for argument in self.arguments), results)

    def argument(self, name: str) -> BlockArgument:
        """The argument called `name`; raises KeyError."""
        if name not in self.arg_names:
            raise KeyError(name)
        return self.arguments[self.arg_names.index(name)]

    def verify_semantics(self) -> None:
        block = self.body
        if not isinstance(block.last, ReturnOp):
            raise VerifyError(f"the function {self.sym_name} must end in func.return", self)
        actual = FunctionType(
            tuple(argument.type for argument in block.arguments), tuple(value.type for value in block.last.operands)
        )
        if actual != self.function_type:
            raise VerifyError(f"the function {self.sym_name} is {actual}, but declares {self.function_type}", self)
        for names, count, what in (
            (self.arg_names, len(block.arguments), "arguments"),
            (self.result_names, block.last.operand_count, "results"),
        ):
            if names and (len(names) != count or len(set(names)) != count):
                raise VerifyError(f"the function {self.sym_name} has {count} {what}, but names {list(names)}", self)


class ReturnOp(Op, name="func.return", terminator=True):
    """Ends a function."""

    values = VariadicOperand()


class WeightOp(Op, name="moec.weight", pure=True):
    """A reference to a tensor of the model, never its bytes.

    `weight_name` is the parameter's name in the source module; `source` is an expression over tensors in files
    (`moec.weights.expression`).
    """

    weight_name = Attr(str)
    source = Attr(str)
    value = Result()

    def verify_semantics(self) -> None:
        kind = self.results[0].type
        if not isinstance(kind, TensorType) or not kind.is_static:
            raise VerifyError(f"a weight has a static shape, not {kind}", self)


class ConstantOp(Op, name="moec.constant", pure=True):
    """A small tensor that is part of the text."""

    data = Attr(DenseConstant)
    value = Result()

    def verify_semantics(self) -> None:
        kind = self.results[0].type
        if not isinstance(kind, TensorType) or not kind.is_static:
            raise VerifyError(f"a constant has a static shape, not {kind}", self)
        if kind.nbytes != len(self.data.data):
            raise VerifyError(f"{kind} takes {kind.nbytes} bytes, the constant has {len(self.data.data)}", self)
