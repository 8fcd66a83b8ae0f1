"""parse(print(x)) is x, for whatever a module can hold."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.dialects.builtin import ModuleOp
from moec.ir import (
    DenseConstant,
    DType,
    FunctionType,
    Location,
    Operation,
    SymbolReference,
    TensorType,
    parse_module,
    print_operation,
    structural_difference,
    symbol,
    verify,
)
from tests.ir.strategies import attributes, modules, tensor_types

FAST = settings(max_examples=60, deadline=None)


@FAST
@given(modules())
def test_modules(module: ModuleOp) -> None:
    verify(module)
    text = print_operation(module, locations=True)
    again = parse_module(text)
    verify(again)
    assert structural_difference(module, again) is None
    assert print_operation(again, locations=True) == text
    assert [op.location for op in again.walk()] == [op.location for op in module.walk()]
    copy = module.clone()
    verify(copy)
    assert print_operation(copy, locations=True) == text
    assert not {id(op) for op in copy.walk()} & {id(op) for op in module.walk()}


@FAST
@given(tensor_types)
def test_types(kind: TensorType) -> None:
    op = parse_module(str(Operation("test.a", [], [kind]).__repr__()[1:-1]))
    assert op.result.type == kind


@pytest.mark.parametrize(
    "value",
    [
        True,
        1,
        1.0,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        "",
        'a "quoted" \\ back\\\\slash\n\t\x00\x7f',
        "ungleich ≠ 中 🦙",
        None,
        (),
        ((1, 1.0, True), ("x", None)),
        DType.C64,
        TensorType((), DType.I1),
        FunctionType((), ()),
        FunctionType((TensorType((2,), DType.F32),), (FunctionType((), (TensorType((), DType.U8),)),)),
        symbol("batch") * symbol("seq") + 1,
        SymbolReference('odd "name"\\'),
        DenseConstant(b""),
        10**39,
        -(2**63),
    ],
    ids=repr,
)
def test_attribute(value: object) -> None:
    text = print_operation(Operation("test.a", attributes={"key": value}))
    found = parse_module(text).attributes["key"]
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_not_a_number_keeps_its_bits() -> None:
    payload = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_0123))[0]
    found = parse_module(print_operation(Operation("test.a", attributes={"key": payload}))).attributes["key"]
    assert struct.pack("<d", found) == struct.pack("<d", payload)


@FAST
@given(attributes, st.text(st.characters(codec="utf-8"), min_size=1, max_size=8))
def test_attributes_and_their_names(value: object, name: str) -> None:
    op = Operation("test.a", attributes={name: value})
    again = parse_module(print_operation(op))
    assert structural_difference(op, again) is None


def test_locations_of_a_file() -> None:
    op = parse_module('\n  "test.a"() : () -> ()', "some.mlir")
    assert op.location == Location(file="some.mlir", line=2, column=3)
    op = parse_module('"test.a"() : () -> () loc("scope"("x.py":3:4))', "some.mlir")
    assert op.location == Location("scope", "x.py", 3, 4)


def test_numbers_as_mlir_writes_them() -> None:
    text = '"test.a"() {a = 2 : i64, b = 1.5 : f64, c, d = 0x10} : () -> ()'
    assert parse_module(text).attributes == {"a": 2, "b": 1.5, "c": None, "d": 16}
