"""The intermediate representation: operations, types, attributes, verifier, printer and parser.

Reading order: `location`, `dimensions`, `types`, `attributes`, `operation`, `definition`, `printer`, `pretty`, `lexer`,
`value_parser`, `parser`, `verifier`, `equality`. Nothing here knows of torch, ONNX or Triton.
"""

from moec.ir.attributes import Attribute, DenseConstant, SymbolReference, enum_attribute, struct_attribute
from moec.ir.definition import Attr, Op, Operand, OptionalOperand, Result, VariadicOperand, VariadicResult
from moec.ir.dimensions import Dim, DimExpr, symbol
from moec.ir.equality import structural_difference, structurally_equal
from moec.ir.location import UNKNOWN, Location
from moec.ir.operation import Block, BlockArgument, Operation, OpResult, Region, Value
from moec.ir.parser import parse_module, parse_operation
from moec.ir.printer import print_operation
from moec.ir.types import DType, FunctionType, TensorType, Type
from moec.ir.verifier import VerifyError, verify

__all__ = [
    "UNKNOWN",
    "Attr",
    "Attribute",
    "Block",
    "BlockArgument",
    "DType",
    "DenseConstant",
    "Dim",
    "DimExpr",
    "FunctionType",
    "Location",
    "Op",
    "OpResult",
    "Operand",
    "Operation",
    "OptionalOperand",
    "Region",
    "Result",
    "SymbolReference",
    "TensorType",
    "Type",
    "Value",
    "VariadicOperand",
    "VariadicResult",
    "VerifyError",
    "enum_attribute",
    "parse_module",
    "parse_operation",
    "print_operation",
    "struct_attribute",
    "structural_difference",
    "structurally_equal",
    "symbol",
    "verify",
]
