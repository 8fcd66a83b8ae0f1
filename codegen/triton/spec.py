"""What a layer with experts is to the kernels: everything that is decided when source is rendered.

Layers with equal specifications share one file of kernels. What differs between them (weights, widths, offsets) are
tensors that the kernels read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moec.codegen.triton.activation import ActivationSource
from moec.dialects.moe import Routing

WIDTH_UNIT = 16
"""Widths of experts are padded with zeros to a multiple of this, so that every row starts at an aligned address."""

PLANE_BLOCK = 128
"""Columns of a packed matrix that share words; rows of packed matrices are padded to a multiple of it."""


class Element(Enum):
    """The type of hidden states, of weights that are not packed, and of what matrix instructions multiply."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        """The same in torch."""
        dtype = getattr(torch, self.value)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one number."""
        return 4 if self is Element.FLOAT32 else 2


@dataclass(frozen=True)
class MatrixFormat:
    """How the numbers of a matrix are stored.

    `bits` 0: numbers of the layer's element type. 8: one signed byte each. 4 and 2: `16 // bits` unsigned codes in a
    16-bit word; a word holds one code of each of as many equal parts of a block of `PLANE_BLOCK` columns, so that the
    codes of one plane are neighbours. A number is scale * (code - middle - zero point). `scale_columns` neighbours in a
    row share a scale, all of them where it is 0; `zero_points`: whether there is one float beside each scale.
    """

    bits: int = 0
    middle: int = 0
    scale_columns: int = 0
    zero_points: bool = False

    @property
    def packed(self) -> bool:
        """Whether numbers are codes."""
        return self.bits != 0

    @property
    def planes(self) -> int:
        """Codes in a word."""
        return 16 // self.bits if self.bits in (2, 4) else 1

    @property
    def step(self) -> int:
        """Columns that one step of the loop over a packed row takes."""
        return min(PLANE_BLOCK, self.scale_columns or PLANE_BLOCK) if self.bits == 8 else PLANE_BLOCK

    @property
    def decoder(self) -> str:
        """The name of the function that makes numbers of the codes of one plane."""
        return f"codes_{self.bits}_middle_{self.middle}"

    @property
    def column_unit(self) -> int:
        """Rows are padded with zeros to a multiple of this."""
        return PLANE_BLOCK if self.packed else WIDTH_UNIT

    def bits_per_weight(self, element: Element) -> float:
        """Bits of a number, with its part of the scales of groups; scales of rows are not counted."""
        if not self.packed:
            return 8.0 * element.nbytes
        return self.bits + (32 * (1 + self.zero_points) / self.scale_columns if self.scale_columns else 0.0)

    @property
    def name(self) -> str:
        """Part of the names of arguments and tensors, such as `float` or `int4_group64`."""
        if not self.packed:
            return "float"
        base = "ternary" if self.bits == 2 and self.middle == 1 else f"int{self.bits}"
        return base + (f"_group{self.scale_columns}" if self.scale_columns else "") + ("_zero" * self.zero_points)


FLOAT = MatrixFormat()


@dataclass(frozen=True)
class RouteOperands:
    """Which per-expert vectors the route has besides the logits."""

    logit_bias: bool = False
    mask: bool = False
    select_bias: bool = False
    per_expert_scale: bool = False


@dataclass(frozen=True)
class Product:
    """One of the two products of an expert, as the templates see it.

    `results`: the blocks it gives. `source`: the pointer whose rows it multiplies. `columns`: their length, 0 for an
    expert's width; `extent` the same with padding. `rows`: rows of all its matrices, 0 where widths differ. `stride`,
    `scale_stride`: elements from one expert to the next, 0 where a table says where an expert lies. `table`: the column
    of the table that holds the number of the format; offsets of codes and of scales are in the next two.
    """

    results: tuple[str, ...]
    source: str
    formats: tuple[MatrixFormat, ...]
    columns: int
    rows: int
    stride: int
    scale_stride: int
    table: int

    @property
    def scaled(self) -> bool:
        """Whether any format has scales."""
        return any(item.packed for item in self.formats)

    def fewest_bits(self, element: Element) -> float:
        """Bits that a weight takes in the smallest of the formats, with its part of scales and zero points."""
        return min(item.bits_per_weight(element) for item in self.formats)

    def extent(self, item: MatrixFormat) -> int:
        """Stored columns of a row in a format, 0 for an expert's width."""
        return padded(self.columns, item.column_unit)


@dataclass(frozen=True)
class LayerKind:
    """What layers of one file of kernels have in common.

    `outputs` are the router's, `experts` the stored ones; `identity` says that output i is expert i. `width` is the
    padded width of every expert, 0 where they differ; then `largest_width` bounds them. `input_formats` are the formats
    of gate and up, `output_formats` those of down, in the order in which experts name them.
    """

    element: Element
    hidden_size: int
    outputs: int
    experts: int
    top_k: int
    routing: Routing
    route_operands: RouteOperands
    router_bias: bool
    identity: bool
    activation: ActivationSource
    width: int
    largest_width: int
    biases: bool
    input_formats: tuple[MatrixFormat, ...]
    output_formats: tuple[MatrixFormat, ...]

    @property
    def gated(self) -> bool:
        """Whether experts have a gate beside up."""
        return self.activation.gated

    @property
    def gate_up(self) -> Product:
        """The product in front of the activation."""
        results = ("gate", "up") if self.gated else ("up",)
        return self._product(results, "x_ptr", self.input_formats, self.hidden_size, len(results) * self.width, 1)

    @property
    def down(self) -> Product:
        """The product behind the activation."""
        return self._product(("down",), "hidden_ptr", self.output_formats, self.width, self.hidden_size, 4)

    def _product(
        self,
        results: tuple[str, ...],
        source: str,
        formats: tuple[MatrixFormat, ...],
        columns: int,
        rows: int,
        table: int,
    ) -> Product:
        stride = scale_stride = 0
        if self.width and len(formats) == 1:
            stride, scale_stride = stored_sizes(formats[0], rows, columns)
        return Product(results, source, formats, columns, rows, stride, scale_stride, table)


def padded(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


def stored_sizes(item: MatrixFormat, rows: int, columns: int) -> tuple[int, int]:
    """Elements (numbers, bytes or words) and scales that a matrix [rows, columns] takes, each padded for alignment."""
    extent = padded(columns, item.column_unit)
    groups = extent // item.scale_columns if item.scale_columns else 1
    return padded(rows * extent // item.planes, WIDTH_UNIT), padded(rows * groups, WIDTH_UNIT) * item.packed
