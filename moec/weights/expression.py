"""Weight expressions: how a tensor of the model is made from tensors in files, as immutable values with a text form.

The text is what the IR stores, for example
`concat(1, stack(0, experts.{0:8}.w1.weight), stack(0, experts.{0:8}.w3.weight))`.
Braces stand for a list of numbers: an argument of `stack` or `concat` that contains braces stands for one argument per
number, the same number in all its braces. Equal expressions have equal text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moec.weights.tensor_spec import DTYPE_TO_TEXT


@dataclass(frozen=True, slots=True)
class Expression:
    """Base class of all weight expressions. `str()` is the canonical text, `parse` in `expression_parser` reads it."""

    def __str__(self) -> str:
        return format_expression(self)

    @property
    def operands(self) -> tuple[Expression, ...]:
        """The expressions that this one is made from, in the order of the text."""
        return ()

    def references(self) -> Iterator[Reference]:
        """All references to named tensors below and including this expression, in the order of the text."""
        stack: list[Expression] = [self]
        while stack:
            expression = stack.pop()
            if isinstance(expression, Reference):
                yield expression
            stack.extend(reversed(expression.operands))


@dataclass(frozen=True, slots=True)
class Reference(Expression):
    """The tensor `name` of the checkpoint, or of the tensors in memory."""

    name: str


@dataclass(frozen=True, slots=True)
class Stored(Expression):
    """The computed tensor with the given content digest (64 hexadecimal digits) in the content-addressed store."""

    digest: str


@dataclass(frozen=True, slots=True)
class Stack(Expression):
    """Equally shaped tensors along a new dimension `dim`."""

    dim: int
    parts: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.parts


@dataclass(frozen=True, slots=True)
class Concat(Expression):
    """Tensors one after the other along the existing dimension `dim`."""

    dim: int
    parts: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.parts


@dataclass(frozen=True, slots=True)
class _Unary(Expression):
    operand: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)


@dataclass(frozen=True, slots=True)
class Transpose(_Unary):
    """`operand` with dimensions `first` and `second` exchanged."""

    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Permute(_Unary):
    """`operand` with its dimensions in the order `dims`."""

    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice(_Unary):
    """`operand[start:stop:step]` along `dim`; all are non-negative, step is positive."""

    dim: int
    start: int
    stop: int
    step: int


@dataclass(frozen=True, slots=True)
class Reshape(_Unary):
    """`operand` read in row-major order as `shape`."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cast(_Unary):
    """`operand` converted to the element type `dtype`."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Fp8Block(Expression):
    """Float32 values of `weight` [..., rows, columns] in float8, one scale a block, as DeepSeek-V3 stores them.

    `scale` has shape [..., ceil(rows / block_rows), ceil(columns / block_columns)] and multiplies its block.
    """

    weight: Expression
    scale: Expression
    block_rows: int
    block_columns: int

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.weight, self.scale)


@dataclass(frozen=True, slots=True)
class Mxfp4(Expression):
    """Float32 values of microscaled 4-bit floats, as gpt-oss stores its experts.

    `blocks` uint8 [experts, rows, groups, bytes] hold two values a byte, low half first; `scales` uint8
    [experts, rows, groups] hold exponents biased by 127. The result is transposed: [experts, groups * bytes * 2, rows].
    """

    blocks: Expression
    scales: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.blocks, self.scales)


# NUL cannot be in a tensor name; it marks the numbers in names, where lists of names may differ.
_MARK = "\0"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_./-]+")
# Two names are as easy to read as one with braces.
_SHORTEST_RUN = 3
_NUMBER_IN_NAME = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")


def format_expression(expression: Expression) -> str:
    """The canonical text of `expression`."""
    return _format(expression).replace(_MARK, "")


def _format(expression: Expression) -> str:
    """The text, with each number in a plain name between marks unless the name is inside a compressed list."""
    match expression:
        case Reference(name):
            if not _PLAIN_NAME.fullmatch(name) or name.isdigit():
                return json.dumps(name)
            return _NUMBER_IN_NAME.sub(rf"{_MARK}\1{_MARK}", name)
        case Stored(digest):
            return f"stored({digest})"
        case Stack(dim, parts):
            return f"stack({dim}, {_format_list(parts)})"
        case Concat(dim, parts):
            return f"concat({dim}, {_format_list(parts)})"
        case Transpose(operand, first, second):
            return f"transpose({_format(operand)}, {first}, {second})"
        case Permute(operand, dims):
            return _format_call("permute", operand, dims)
        case Slice(operand, dim, start, stop, step):
            return f"slice({_format(operand)}, {dim}, {start}, {stop}, {step})"
        case Reshape(operand, shape):
            return _format_call("reshape", operand, shape)
        case Cast(operand, dtype):
            return f"cast({_format(operand)}, {DTYPE_TO_TEXT[dtype]})"
        case Fp8Block(weight, scale, rows, columns):
            return f"fp8_block({_format(weight)}, {_format(scale)}, {rows}, {columns})"
        case Mxfp4(blocks, scales):
            return f"mxfp4({_format(blocks)}, {_format(scales)})"
    raise TypeError(f"{type(expression).__name__} has no text form")


def _format_call(name: str, operand: Expression, numbers: tuple[int, ...]) -> str:
    return f"{name}({', '.join([_format(operand), *map(str, numbers)])})"


def _format_list(parts: tuple[Expression, ...]) -> str:
    """The arguments of a variadic operation, runs of them that differ in one number written with braces.

    The result carries no marks: braces belong to the innermost list, so an outer list must not vary inside.
    """
    texts = [_format(part).split(_MARK) for part in parts]
    # Braces inside a nested list would expand there, so a part that contains a list is never compressed.
    plain = [not _contains_list(part) for part in parts]
    result: list[str] = []
    start = 0
    while start < len(parts):
        stop = start + 1
        varying: tuple[int, ...] = ()
        while stop < len(parts) and plain[start] and plain[stop]:
            now = _varying_fields(texts[start], texts[stop])
            if not now or (varying and now != varying) or not _same_number(texts[stop], now):
                break
            if not varying and not _same_number(texts[start], now):
                break
            varying = now
            stop += 1
        if stop - start >= _SHORTEST_RUN:
            braces = "{" + format_numbers([int(texts[k][varying[0]]) for k in range(start, stop)]) + "}"
            fields = [braces if field in varying else text for field, text in enumerate(texts[start])]
            result.append("".join(fields))
            start = stop
        else:
            result.append("".join(texts[start]))
            start += 1
    return ", ".join(result)


def _contains_list(expression: Expression) -> bool:
    return isinstance(expression, (Stack, Concat)) or any(map(_contains_list, expression.operands))


def _varying_fields(first: list[str], other: list[str]) -> tuple[int, ...]:
    """Which fields differ; none when the texts differ in more than numbers (which are the fields of odd index)."""
    if len(first) != len(other):
        return ()
    fields = tuple(field for field, (a, b) in enumerate(zip(first, other, strict=True)) if a != b)
    return fields if all(field % 2 for field in fields) else ()


def _same_number(fields: list[str], varying: tuple[int, ...]) -> bool:
    return len({fields[field] for field in varying}) == 1


def format_numbers(numbers: Sequence[int]) -> str:
    """Numbers in their order, ascending runs of at least two as `start:stop`: [0, 1, 2, 5] is `0:3,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1]:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return ",".join(f"{start}:{stop}" if stop - start > 1 else str(start) for start, stop in runs)
