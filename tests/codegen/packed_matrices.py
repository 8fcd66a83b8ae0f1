"""Packed matrices of random codes in every format, and modules that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing, YieldOp
from moec.dialects.nn import TOKENS
from moec.dialects.quant import (
    BlockFloat,
    BlockScale,
    Codebook,
    DequantOp,
    Element,
    Format,
    Integer,
    Levels,
    Span,
    Ternary,
    TernaryDictionary,
    TritPacking,
    ZeroPoint,
)
from moec.experts import FeedForward, Projection, Quantized
from moec.experts.bodies import build_body, operands_of
from moec.experts.expert import WIDTH, Activation
from moec.ir import Block, TensorType, Value, symbol, verify
from moec.quantization.dictionary import build_dictionary, encode_rows, pack_stream
from moec.quantization.packed import OPERANDS, Packed, pack_codes
from moec.quantization.packing import pack_bits
from moec.reference.element_types import ir_type
from tests.ir.build import f32

GROUP = Span.GROUP
FORMATS: dict[str, Format] = {
    **{f"int{bits} row": Integer(bits) for bits in range(1, 9)},
    **{f"int{bits} g32 zero points": Integer(bits, GROUP, 32, ZeroPoint.INTEGER) for bits in range(1, 9)},
    **{f"int{bits} g16 float zeros": Integer(bits, GROUP, 16, ZeroPoint.FLOAT) for bits in (1, 2, 3, 4, 7, 8)},
    "int4 g8": Integer(4, GROUP, 8),
    "int4 g48": Integer(4, GROUP, 48),
    "int8 tensor": Integer(8, Span.TENSOR),
    "int3 tensor zero points": Integer(3, Span.TENSOR, 0, ZeroPoint.INTEGER),
    "ternary g32": Ternary(Levels.SCALE, GROUP, 32),
    "ternary five per byte": Ternary(Levels.SCALE, packing=TritPacking.FIVE_PER_BYTE),
    "ternary extremes": Ternary(Levels.EXTREMES),
    "ternary extremes of the matrix": Ternary(Levels.EXTREMES, Span.TENSOR, packing=TritPacking.FIVE_PER_BYTE),
    "codebook 4 bits": Codebook(4),
    "codebook 3 bits g32": Codebook(3, 1, GROUP, 32),
    "codebook of pairs": Codebook(6, 2, GROUP, 32),
    "codebook of eights": Codebook(8, 8, Span.TENSOR),
    "mxfp4": BlockFloat(),
    "nvfp4": BlockFloat(Element.E2M1, 16, BlockScale.E4M3),
    "mxfp8": BlockFloat(Element.E4M3),
    **{f"dictionary of {bits} bits": TernaryDictionary(bits) for bits in (8, 10, 11, 12, 16)},
    "dictionary, one scale": TernaryDictionary(10, Levels.SCALE, Span.TENSOR),
}


def random_packed(
    kind: Format, rows: int, columns: int, generator: torch.Generator, numbers: torch.dtype = torch.float32
) -> Packed:
    """A matrix [rows, columns] of random codes; scales of the type `numbers` make its weights some tenths."""
    shape = kind.scale_shape(rows, columns)
    scales = (torch.rand(shape, generator=generator) + 0.5) / columns**0.5

    def codes(bits: int, *size: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, size, generator=generator)

    if isinstance(kind, BlockFloat):
        low, high = (120, 126) if kind.scale is BlockScale.E8M0 else (24, 56)
        bits = pack_codes(kind, codes(kind.element.bits - 1, rows, columns))
        small = torch.randint(low, high, shape, generator=generator).to(torch.uint8)
        whole = torch.tensor([0.03]) if kind.scale is BlockScale.E4M3 else None
        return Packed(kind, columns, bits, small, tensor_scale=whole)
    if isinstance(kind, Ternary | TernaryDictionary):
        if kind.levels is Levels.EXTREMES:
            scales = scales * torch.tensor([-1.0, 1.5])
        share = torch.rand((rows, columns), generator=generator)
        trits = (share > 0.885).long() + (share > 0.95).long()
        if isinstance(kind, Ternary):
            return Packed(kind, columns, pack_codes(kind, trits), scales.to(numbers))
        dictionary = build_dictionary(kind.code_bits, 0.885)
        stream, offsets = encode_rows(trits.to(torch.uint8), dictionary)
        packed = pack_stream(stream, kind.code_bits)
        return Packed(kind, columns, packed, scales.to(numbers), table=dictionary.table(), offsets=offsets)
    if isinstance(kind, Codebook):
        table = torch.randn((1 << kind.bits, kind.dim), generator=generator)
        table = table.sort(0).values if kind.dim == 1 else table
        return Packed(
            kind,
            columns,
            pack_codes(kind, codes(kind.bits, rows, columns // kind.dim)),
            scales.to(numbers),
            table=table,
        )
    assert isinstance(kind, Integer)
    scales = scales / (1 << (kind.bits - 1))
    zeros = None
    if kind.zero_point is ZeroPoint.INTEGER:
        zeros = pack_bits(codes(kind.bits, *shape), kind.bits)
    elif kind.zero_point is ZeroPoint.FLOAT:
        zeros = (torch.rand(shape, generator=generator) * (1 << kind.bits)).to(numbers)
    return Packed(kind, columns, pack_codes(kind, codes(kind.bits, rows, columns)), scales.to(numbers), zeros)


class ModuleBuilder:
    """Builds `main(x) -> y` with weights in memory."""

    def __init__(self, arguments: dict[str, TensorType]) -> None:
        self.function = FuncOp.build("main", list(arguments.values()), arg_names=list(arguments))
        self.weights: dict[str, torch.Tensor] = {}

    def weight(self, name: str, tensor: torch.Tensor) -> Value:
        self.weights[name] = tensor
        kind = TensorType(tuple(tensor.shape), ir_type(tensor.dtype))
        op = WeightOp(result_types=[kind], weight_name=name, source=name)
        self.function.body.append(op)
        return op.value

    def dequant(self, name: str, packed: Packed) -> Value:
        given = {part: self.weight(f"{name}.{part}", tensor) for part, tensor in packed.tensors().items()}
        op = DequantOp(*[given.get(part) for part in OPERANDS], format=packed.format, columns=packed.columns)
        self.function.body.append(op)
        return op.weight

    def finish(self, result: Value) -> ModuleOp:
        self.function.finish([result], ["y"])
        module = ModuleOp.build([self.function])
        verify(module)
        return module


def linear_module(packed: Packed, *, bias: bool = False) -> tuple[ModuleOp, dict[str, torch.Tensor]]:
    """y [batch, seq, rows] = x [batch, seq, columns] times the transpose of a packed matrix."""
    rows, columns = packed.shape
    batch, seq = symbol("batch"), symbol("seq")
    builder = ModuleBuilder({"x": f32(batch, seq, columns)})
    tensors = {"input": builder.function.arguments[0], "weight": builder.dequant("matrix", packed)}
    if bias:
        tensors["bias"] = builder.weight("bias", torch.linspace(-1, 1, rows))
    op = aten.build("linear.default", tensors, (f32(batch, seq, rows),))
    builder.function.body.append(op)
    return builder.finish(op.result), builder.weights


def expert(
    formats: Sequence[Format],
    hidden: int,
    width: int,
    generator: torch.Generator,
    numbers: torch.dtype = torch.float32,
    *,
    bias: bool = False,
) -> FeedForward:
    """A SwiGLU expert whose gate, up and down matrices are packed in `formats`."""
    sizes = [(width, hidden), (width, hidden), (hidden, width)]

    def projection(kind: Format, rows: int, columns: int) -> Projection:
        packed = random_packed(kind, rows, columns, generator, numbers)
        if isinstance(kind, TernaryDictionary):
            # streams of one class are filled up to one length
            missing = rows * columns // 4 - len(packed.codes)
            packed = replace(packed, codes=torch.nn.functional.pad(packed.codes, (0, missing)))
        offset = torch.randn(rows, generator=generator) * 0.1 if bias else None
        return Projection(Quantized(packed, torch.float32), offset)

    gate, up, down = (projection(kind, *size) for kind, size in zip(formats, sizes, strict=True))
    return FeedForward(_swiglu(), gate, up, down)


def _swiglu() -> Activation:
    kind = f32(TOKENS, WIDTH)
    block = Block([kind, kind])
    gate, up = block.arguments
    silu = aten.build("silu.default", {"self": gate}, (kind,))
    product = aten.build("mul.Tensor", {"self": silu.result, "other": up}, (kind,))
    for op in (silu, product, YieldOp([product.result], result_types=[])):
        block.append(op)
    return Activation(True, ("swiglu",), block)


def experts_module(
    classes: Sequence[Sequence[FeedForward]], hidden: int, *, routing: Routing
) -> tuple[ModuleOp, dict[str, torch.Tensor]]:
    """A router and a layer with these classes of experts, in order: y [tokens, hidden] of x."""
    count = symbol("seq")
    builder = ModuleBuilder({"x": f32(count, hidden)})
    total = sum(map(len, classes))
    x = builder.function.arguments[0]
    router = builder.weight("router", torch.randn((total, hidden), generator=torch.Generator().manual_seed(5)))
    logits = aten.build("linear.default", {"input": x, "weight": router}, (f32(count, total),))
    route = RouteOp(logits.result, routing=routing)
    builder.function.body.append(logits)
    builder.function.body.append(route)
    weights: list[Value] = []
    kinds, regions = [], []
    first = 0
    for number, members in enumerate(classes):
        operands = [operands_of(member) for member in members]
        shared = sum(item.shared for item in operands[0])
        for position, item in enumerate(operands[0]):
            parts = [found[position].tensor for found in operands]
            weights.append(
                builder.weight(f"class_{number}.{item.name}", parts[0] if item.shared else torch.stack(parts))
            )
        regions.append(build_body(members[0], hidden))
        kinds.append(ExpertClass(tuple(range(first, first + len(members))), len(operands[0]), shared))
        first += len(members)
    layer = ExpertsOp(
        x, route.ids, route.gates, weights, regions=regions, stored=tuple(range(total)), classes=tuple(kinds)
    )
    builder.function.body.append(layer)
    return builder.finish(layer.y), builder.weights
