"""Prints operations as MLIR's generic form, in one canonical way.

The text is a subset of what `mlir-opt --allow-unregistered-dialect` and xDSL read. Attributes are sorted by name,
values are numbered in order.
"""

from __future__ import annotations

import math
import re
import struct
from enum import Enum
from typing import Any

from moec.ir.attributes import MNEMONIC, DenseConstant, SymbolReference, struct_fields
from moec.ir.dimensions import DimExpr
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Operation, Value
from moec.ir.types import DType, FunctionType, Type, result_types_text

_BARE_NAME = re.compile(r"[A-Za-z_][\w$.]*\Z", re.ASCII)
_PLAIN_STRING = re.compile(r'[^"\\\x00-\x1f\x7f-\U0010ffff]*\Z')


def print_operation(op: Operation, *, locations: bool = False, regions: bool = True) -> str:
    """The text of `op`. `locations` adds `loc(...)`; without `regions` their bodies are left out (`({...})`), for
    messages."""
    printer = _Printer(locations, regions)
    printer.print_op(op, "")
    return "".join(printer.out)


def message_text(op: Operation) -> str:
    """The text of `op` alone for messages; it also serves operations that hold what is no attribute."""
    try:
        return print_operation(op, regions=False)
    except TypeError as error:
        return f'"{op.name}" ({error})'


class _Printer:
    def __init__(self, locations: bool, regions: bool) -> None:
        self.out: list[str] = []
        self.names: dict[Value, str] = {}
        self.value_count = 0
        self.argument_count = 0
        self.locations = locations
        self.regions = regions

    def print_op(self, op: Operation, indent: str) -> None:
        out, names = self.out, self.names
        results = op.results
        out.append(indent)
        if results:
            name = f"%{self.value_count}"
            self.value_count += 1
            if len(results) == 1:
                names[results[0]] = name
                out.append(f"{name} = ")
            else:
                for index, result in enumerate(results):
                    names[result] = f"{name}#{index}"
                out.append(f"{name}:{len(results)} = ")
        operands = ", ".join([names.get(value) or self._outer_name(value) for value in op._operands])
        out.append(f'"{op.name}"({operands})')
        properties, others = op.attributes, {}
        if op.property_names is not None:
            properties = {key: value for key, value in op.attributes.items() if key in op.property_names}
            others = {key: value for key, value in op.attributes.items() if key not in op.property_names}
        if properties:
            out.append(f" <{{{attributes_text(properties)}}}>")
        if op.regions:
            self._print_regions(op, indent)
        if others:
            out.append(f" {{{attributes_text(others)}}}")
        types = [result.type for result in results]
        out.append(f" : ({', '.join([str(value.type) for value in op._operands])}) -> {result_types_text(types)}")
        if self.locations and op.location is not UNKNOWN and op.location != UNKNOWN:
            out.append(f" {location_text(op.location)}")

    def _outer_name(self, value: Value) -> str:
        # A value defined outside the printed fragment: numbered like an argument, so that messages stay readable.
        name = f"%arg{self.argument_count}"
        self.argument_count += 1
        self.names[value] = name
        return name

    def _print_regions(self, op: Operation, indent: str) -> None:
        out = self.out
        if not self.regions:
            out.append(" (" + ", ".join(["{...}"] * len(op.regions)) + ")")
            return
        out.append(" (")
        for position, region in enumerate(op.regions):
            out.append("{\n" if position == 0 else ", {\n")
            block = region.block
            if block.arguments:
                declared = [f"{self._outer_name(argument)}: {argument.type}" for argument in block.arguments]
                out.append(f"{indent}^bb0({', '.join(declared)}):\n")
            for nested in block:
                self.print_op(nested, indent + "  ")
                out.append("\n")
            out.append(indent + "}")
        out.append(")")


def attributes_text(attributes: dict[str, Any]) -> str:
    """The entries of an attribute dictionary, sorted by name."""
    return ", ".join([f"{name_text(key)} = {attribute_text(attributes[key])}" for key in sorted(attributes)])


def name_text(name: str) -> str:
    """A bare name where MLIR allows it, else a string literal."""
    return name if _BARE_NAME.match(name) else string_text(name)


def string_text(text: str) -> str:
    """A string literal; control and non-ASCII bytes as `\\XX`."""
    if _PLAIN_STRING.match(text):
        return f'"{text}"'
    pieces = []
    for byte in text.encode("utf-8", "surrogatepass"):
        char = chr(byte)
        pieces.append(char if 32 <= byte < 127 and char not in '"\\' else f"\\{byte:02X}")
    return '"' + "".join(pieces) + '"'


def float_text(value: float) -> str:
    """A float literal that reads back to the same bits."""
    if math.isinf(value) or math.isnan(value):
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X} : f64"
    text = repr(value)
    mantissa, mark, exponent = text.partition("e")
    return (mantissa if "." in mantissa else mantissa + ".0") + mark + exponent


def attribute_text(value: Any) -> str:
    """The text of one attribute; raises TypeError for a value that is none."""
    if value is True:
        return "true"
    if value is False:
        return "false"
    if value is None:
        return "unit"
    kind = type(value)
    if kind is int:
        return str(value)
    if kind is str:
        return string_text(value)
    if kind is float:
        return float_text(value)
    if kind is tuple:
        return "[" + ", ".join([attribute_text(item) for item in value]) + "]"
    if kind is DType:
        return str(value.value)
    if isinstance(value, FunctionType):
        return str(value)
    if isinstance(value, Type):
        return str(value)
    if kind is DimExpr:
        return f"#moec.dim<{value}>"
    if kind is DenseConstant:
        return f'#moec.dense<"{value.data.hex()}">'
    if kind is SymbolReference:
        return "@" + name_text(value.name)
    mnemonic = MNEMONIC.get(kind)
    if mnemonic is None:
        raise TypeError(f"{value!r} is no attribute")
    if isinstance(value, Enum):
        return f"#{mnemonic}<{value.value}>"
    fields = ", ".join([f"{name} = {attribute_text(item)}" for name, item in struct_fields(value)])
    return f"#{mnemonic}<{fields}>"


def location_text(location: Location) -> str:
    """`loc(...)` with the name, the position, or both."""
    position = f"{string_text(location.file)}:{location.line}:{location.column}" if location.file else ""
    if location.name and position:
        return f"loc({string_text(location.name)}({position}))"
    return f"loc({string_text(location.name) if location.name else position})"
