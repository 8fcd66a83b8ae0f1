"""Routers that are more than one linear map of the experts' rows, as lines of torch.

The logits of few experts are no work for a kernel of their own: operations of the IR that lie between the rows and the
logits become calls of the operators of torch that they are named after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.experts import MoeLayer
from moec.experts.router_source import router_path
from moec.ir import DimExpr, DType, Value

_INTEGERS = {DType.I64: "int64", DType.I32: "int32", DType.I1: "bool"}
_LINE = 116
_LAYOUT_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})


class UnspelledRouterError(Exception):
    """Why a router has no lines; the message completes "the router ..."."""


@dataclass(frozen=True)
class RouterSource:
    """The lines of a function of `rows` [tokens, H] and `weights`, the last of which returns the logits."""

    lines: tuple[str, ...]


def spell_router(layer: MoeLayer) -> tuple[RouterSource, list[Value]]:
    """The function and what its weights are. Raises UnspelledRouterError."""
    path = router_path(layer)
    names: dict[Value, str] = {layer.experts.x: "rows"}
    weights: list[Value] = []
    lines: list[tuple[str, str, list[str]]] = []
    for op in path:
        assert isinstance(op, AtenOp)
        if op.name == "aten.embedding.default":
            raise UnspelledRouterError("chooses by the model's tokens, which a block of a model is not given")
        for value in op.operands:
            if value in names:
                continue
            if not isinstance(value.defining_op, WeightOp | ConstantOp):
                raise UnspelledRouterError("reads other rows than its experts")
            names[value] = f"weights[{len(weights)}]"
            weights.append(value)
        name = f"step_{len(lines)}"
        lines.append((f"{name} = ", *_call(op, names)))
        for number, result in enumerate(op.results):
            names[result] = name if len(op.results) == 1 else f"{name}[{number}]"
    if layer.experts.x not in {value for op in path for value in op.operands}:
        raise UnspelledRouterError("reads other rows than its experts")
    lines[-1] = ("return ", *lines[-1][1:])
    return RouterSource(tuple(part for line in lines for part in _wrapped(*line))), weights


def _wrapped(before: str, function: str, arguments: list[str]) -> list[str]:
    """A call on one line, or with its arguments on one of their own, or each on one."""
    line = f"{before}{function}({', '.join(arguments)})"
    if len(line) <= _LINE:
        return [line]
    inner = ", ".join(arguments)
    middle = [f"    {inner}"] if len(inner) + 4 <= _LINE else [f"    {item}," for item in arguments]
    return [f"{before}{function}(", *middle, ")"]


def _call(op: AtenOp, names: dict[Value, str]) -> tuple[str, list[str]]:
    packet, _, kind = op.name.removeprefix("aten.").partition(".")
    overload = getattr(getattr(torch.ops.aten, packet), kind)
    given = []
    for argument in overload._schema.arguments:
        if argument.name in _LAYOUT_ARGUMENTS:
            continue
        tensors = op.tensors(argument.name)
        if str(argument.type).startswith(("List[Tensor", "List[Optional[Tensor")):
            given.append(f"{_keyword(argument)}[{', '.join(names[value] for value in tensors)}]")
        elif tensors:
            given.append(f"{_keyword(argument)}{names[tensors[0]]}")
        elif argument.name in op.attributes:
            given.append(f"{_keyword(argument)}{_literal(op.attributes[argument.name])}")
    return f"torch.ops.aten.{packet}.{kind}", given


def _keyword(argument: torch._C.Argument) -> str:
    # torch calls every first tensor self, which may only be given by its place
    return "" if argument.name in ("self", "input") and not argument.kwarg_only else f"{argument.name}="


def _literal(value: object) -> str:
    match value:
        case None | bool() | int() | float():
            return repr(value)
        case str() if value.isidentifier():
            return f'"{value}"'
        case DType() if value.is_float or value in _INTEGERS:
            return f"torch.{_INTEGERS.get(value, 'float32')}"
        case DimExpr():
            return "-1"
        case tuple():
            items = [_literal(item) for item in value]
            if sum(isinstance(item, DimExpr) for item in value) > 1:
                raise UnspelledRouterError("reads whole sequences, and a block of a model is given rows")
            return f"[{', '.join(items)}]"
    raise UnspelledRouterError(f"has an argument {value!r} that has no form in source")
