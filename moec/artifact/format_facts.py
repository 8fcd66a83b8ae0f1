"""What packed matrices of experts are stored as, in words, and how many bits a weight of theirs takes."""

from __future__ import annotations

from collections.abc import Mapping, Set

from moec.dialects.quant import BlockFloat, BlockScale, Codebook, DequantOp, Element, Format, Integer, Span, Ternary
from moec.ir import Region, TensorType, Value


def describe_format(packed: Format) -> str:
    """The format in a few words, such as `int4 g32`."""
    match packed:
        case Integer(bits=bits):
            name = f"int{bits}"
        case Codebook(bits=bits, dim=dim):
            name = f"codebook {bits} bits" if dim == 1 else f"codebook {bits} bits of {dim}"
        case BlockFloat(element=Element.E2M1, scale=BlockScale.E4M3):
            return "NVFP4"
        case BlockFloat(element=element):
            return "MXFP4" if element is Element.E2M1 else "MXFP8"
        case Ternary():
            name = "ternary"
        case _:
            return "ternary dictionary"
    span = getattr(packed, "span", Span.ROW)
    return f"{name} g{getattr(packed, 'group', 0)}" if span is Span.GROUP else name


def packed_facts(region: Region, sizes: Mapping[Value, int], shared: Set[Value] = frozenset()) -> tuple[str, float]:
    """(formats, bits per weight) of the packed matrices of one expert; ("", 0.0) where it has none.

    `sizes` are the bytes of what the arguments of the body read for one expert, scales and tables among them. Matrices
    of `shared` arguments alone, such as a base, have formats, but the bits are those of the expert's own.
    """
    matrices = [op for op in region.block if isinstance(op, DequantOp)]
    if not matrices:
        return "", 0.0
    formats = dict.fromkeys(describe_format(op.format) for op in matrices)
    matrices = [op for op in matrices if not set(op.operands) <= shared]
    stored = sum(sizes[value] for value in dict.fromkeys(value for op in matrices for value in op.operands))
    weights = 0
    for op in matrices:
        kind = op.weight.type
        assert isinstance(kind, TensorType)
        rows, columns = kind.static_shape
        weights += rows * columns
    return " and ".join(formats), 8 * stored / max(weights, 1)
