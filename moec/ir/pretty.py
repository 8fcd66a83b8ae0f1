"""A short form of IR for people. It cannot be read back.

main(%input_ids: [batch, seq] i64) -> logits:
  %0 = weight model.embed_tokens.weight : [256, 64] f32
  %1 = aten.embedding.default %0, %input_ids : [batch, seq, 64] f32   // model.embed_tokens
"""

from __future__ import annotations

from typing import Any

from moec.ir.attributes import MNEMONIC, DenseConstant, struct_fields
from moec.ir.definition import SEGMENTS, Op
from moec.ir.dimensions import DimExpr
from moec.ir.operation import Block, Operation, Value
from moec.ir.printer import attribute_text
from moec.ir.types import TensorType, Type

# Attributes that say in the text what the reader sees anyway.
_HIDDEN = frozenset({SEGMENTS, "operand_layout", "function_type", "sym_name", "arg_names", "result_names"})
_SEQUENCE_LIMIT = 8


def print_pretty(op: Operation) -> str:
    """The short form of an operation with everything inside it."""
    printer = _Pretty()
    printer.operation(op, 0)
    return "\n".join(printer.lines)


class _Pretty:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.count = 0

    def operation(self, op: Operation, depth: int) -> None:
        if op.name == "builtin.module":
            for nested in op.regions[0].block:
                self.operation(nested, depth)
            return
        indent = "  " * depth
        if op.name == "func.func":
            self._function(op, depth)
            return
        results = [self._new_name(value) for value in op.results]
        line = f"{indent}{', '.join(results)}{' = ' if results else ''}{_name(op)}"
        line += "".join(f" {piece}" for piece in self._operands(op))
        shown = {key: value for key, value in sorted(op.attributes.items()) if key not in _HIDDEN}
        name = str(shown.pop("weight_name", ""))
        if name:
            line += f" {name}"
            if shown.get("source") == name:
                del shown["source"]
        attributes = [f"{key} = {_value(value)}" for key, value in shown.items()]
        if attributes:
            line += f" {{{', '.join(attributes)}}}"
        if op.results:
            line += f" : {', '.join(_type(value.type) for value in op.results)}"
        if op.location.name and op.location.name != name:
            line += f"   // {op.location.name}"
        self.lines.append(line)
        for region in op.regions:
            self._block(region.block, depth + 1)

    def _function(self, op: Operation, depth: int) -> None:
        block = op.regions[0].block
        given = op.attributes.get("arg_names") or ()
        declared = []
        for index, argument in enumerate(block.arguments):
            name = self._new_name(argument, str(given[index]) if index < len(given) else f"arg{index}")
            declared.append(f"{name}: {_type(argument.type)}")
        results = ", ".join(map(str, op.attributes.get("result_names") or ()))
        arrow = f" -> {results}" if results else ""
        self.lines.append(f"{'  ' * depth}{op.attributes.get('sym_name', 'func')}({', '.join(declared)}){arrow}:")
        for nested in block:
            self.operation(nested, depth + 1)

    def _block(self, block: Block, depth: int) -> None:
        declared = [f"{self._new_name(argument)}: {_type(argument.type)}" for argument in block.arguments]
        self.lines.append(f"{'  ' * depth}({', '.join(declared)}):")
        for nested in block:
            self.operation(nested, depth + 1)

    def _operands(self, op: Operation) -> list[str]:
        """Operands with a comma behind each but the last; those that a name makes clearer have one."""
        labels = _labels(op)
        texts = []
        for value, label in zip(op.operands, labels, strict=True):
            name = self.names.get(value) or self._new_name(value)
            texts.append(f"{label}={name}" if label else name)
        return [f"{text}," for text in texts[:-1]] + texts[-1:]

    def _new_name(self, value: Value, wanted: str = "") -> str:
        name = f"%{wanted}" if wanted and f"%{wanted}" not in self.taken else f"%{self.count}"
        if name == f"%{self.count}":
            self.count += 1
        self.taken.add(name)
        self.names[value] = name
        return name


def _name(op: Operation) -> str:
    return op.name.removeprefix("func.").removeprefix("moec.").removesuffix(".default")


def _labels(op: Operation) -> list[str]:
    """A name for each operand where an optional one before it is absent; "" elsewhere."""
    if not isinstance(op, Op) or not op._segmented:
        return [""] * op.operand_count
    labels: list[str] = []
    gap = False
    for index, (name, position) in enumerate(op.operand_specs):
        values = op.operand_segment(index)
        gap = gap or (position.optional and not values)
        labels += [name if gap else ""] * len(values)
    return labels


def _type(kind: Type) -> str:
    if isinstance(kind, TensorType):
        return f"[{', '.join(map(str, kind.shape))}] {kind.dtype.value}"
    return str(kind)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return attribute_text(value)
    if isinstance(value, float):
        return f"{value:.6g}" if value == float(f"{value:.6g}") else repr(value)
    if isinstance(value, DimExpr):
        return str(value)
    if isinstance(value, DenseConstant):
        return f"{len(value.data)} bytes"
    if isinstance(value, tuple):
        shown = [_value(item) for item in value[:_SEQUENCE_LIMIT]]
        more = [f"... {len(value)} in all"] if len(value) > _SEQUENCE_LIMIT else []
        return f"[{', '.join(shown + more)}]"
    if type(value) in MNEMONIC:
        if hasattr(value, "value"):
            return str(value.value)
        return "<" + ", ".join(f"{name} = {_value(item)}" for name, item in struct_fields(value)) + ">"
    return attribute_text(value)
