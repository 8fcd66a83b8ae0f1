"""What a layer with experts is to the kernels: everything that is decided when source is rendered.

Layers with equal specifications share one file of kernels. What differs between them (weights, widths, offsets) are
tensors that the kernels read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moec.codegen.triton.activation import ActivationSource
from moec.codegen.triton.router_path import RouterSource
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

    `bits` 0: numbers of the layer's element type. 8: one signed byte each. 4 and 2: `16 // bits` unsigned codes in each
    half of a 32-bit word; a half holds one code of each of as many equal parts of a block of `PLANE_BLOCK` columns, so
    that the codes of one plane are neighbours. A number is scale * (code - middle - zero point). `scale_columns`
    neighbours in a row share a scale, all of them where it is 0; `zero_points`: whether there is one beside each scale.
    `two_levels`, of trits of whole rows: the float beside the scale is another scale, that of |code - middle|.
    """

    bits: int = 0
    middle: int = 0
    scale_columns: int = 0
    zero_points: bool = False
    two_levels: bool = False

    @property
    def packed(self) -> bool:
        """Whether numbers are codes."""
        return self.bits != 0

    @property
    def planes(self) -> int:
        """Codes in half a word."""
        return 16 // self.bits if self.bits in (2, 4) else 1

    @property
    def plane_block(self) -> int:
        """Columns that share words: fewer than `PLANE_BLOCK` where a scale is for fewer than those of a plane."""
        return self.planes * min(PLANE_BLOCK // self.planes, self.scale_columns or PLANE_BLOCK)

    @property
    def codes_per_element(self) -> int:
        """Numbers in an element of what is stored: a number, a byte or a word."""
        return 2 * self.planes if self.planes > 1 else 1

    @property
    def parts(self) -> int:
        """Groups with a scale of their own in one step of the loop over a packed row."""
        return self.plane_block // self.scale_columns if 0 < self.scale_columns < self.plane_block else 1

    @property
    def unit(self) -> int:
        """Kernels read the code c of a plane as 1 + c / unit, which is the fraction of a float; bytes as they are."""
        return 1 << self.bits if self.planes > 1 else 1

    @property
    def zero_code(self) -> float:
        """What kernels read where a number is zero, but for zero points."""
        return 1 + self.middle / self.unit if self.planes > 1 else 0.0

    def folded(self, element: Element) -> bool:
        """Whether `zero_code` is taken off the sums of products instead of each number."""
        return self.planes > 1 and not self.two_levels and (element.nbytes == 2 or self.zero_points)

    def step(self, element: Element) -> int:
        """Columns that one step of the loop over a packed row takes.

        Without matrix instructions, numbers of a whole step lie in registers.
        """
        if self.bits != 8:
            return self.plane_block
        most = PLANE_BLOCK if element.nbytes == 2 else 32
        return min(most, self.scale_columns or most)

    def decoder(self, element: Element) -> str:
        """The name of the function that makes numbers of the codes of one plane."""
        return f"codes_{self.bits}" + ("" if self.folded(element) else f"_less_{self.middle}")

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
        more = "_zero" * self.zero_points + "_levels" * self.two_levels
        return base + (f"_group{self.scale_columns}" if self.scale_columns else "") + more


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
    of the table that holds the number of the format; offsets of codes and of scales are in the next two. `optional`:
    some experts have no such matrix, and -1 in that column.
    """

    results: tuple[str, ...]
    source: str
    formats: tuple[MatrixFormat, ...]
    columns: int
    rows: int
    stride: int
    scale_stride: int
    table: int
    optional: bool = False

    @property
    def scaled(self) -> bool:
        """Whether any format has scales."""
        return any(item.packed for item in self.formats)

    def fewest_bits(self, element: Element) -> float:
        """Bits that a weight takes in the smallest of the formats, with its part of scales and zero points."""
        return min((item.bits_per_weight(element) for item in self.formats), default=8.0 * element.nbytes)

    def extent(self, item: MatrixFormat) -> int:
        """Stored columns of a row in a format, 0 for an expert's width."""
        return padded(self.columns, item.column_unit)


@dataclass(frozen=True)
class Factors:
    """Matrices of few rows that experts multiply through: left @ (right @ x). Sizes are padded, 0 where there is none.

    Of gate and up, `input_rank` is the largest rank; right factors are an expert's own (`own_input`), or projections of
    all rows into `latent` numbers. Of down, `output_rank` is the largest rank; left factors are an expert's own
    (`own_output`), or read the sum over a token's slots, `output_latent` numbers.
    """

    input_rank: int = 0
    own_input: bool = False
    latent: int = 0
    output_rank: int = 0
    own_output: bool = False
    output_latent: int = 0


@dataclass(frozen=True)
class LayerKind:
    """What layers of one file of kernels have in common.

    `router` is there where the router is more than a linear map. `outputs` are the router's, `experts` what slots
    name: stored experts, or parts of them, and behind those the parts that every token has. `identity` says that output
    i is expert i. `width` is the padded width of every expert, 0 where they differ; then `largest_width` bounds them.
    `input_formats` are the formats of gate and up, `output_formats` those of down, in the order in which experts name
    them. `scattered`: only the table says where matrices of the two products lie; `optional`: some experts have none.
    `parts`: how many parts an expert may have; `shared_gates`: for each part that every token has, its row of the
    matrix of gates, -1 for the weight 1.
    """

    element: Element
    hidden_size: int
    outputs: int
    experts: int
    top_k: int
    routing: Routing
    route_operands: RouteOperands
    router: RouterSource | None
    identity: bool
    activations: tuple[ActivationSource, ...]
    width: int
    largest_width: int
    biases: bool
    input_formats: tuple[MatrixFormat, ...]
    output_formats: tuple[MatrixFormat, ...]
    scattered: tuple[bool, bool] = (False, False)
    optional: tuple[bool, bool] = (False, False)
    factors: Factors = Factors()
    parts: int = 1
    shared_gates: tuple[int, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether experts have a gate beside up."""
        return any(item.gated for item in self.activations)

    @property
    def expanded(self) -> bool:
        """Whether a choice of the router stands for other slots than itself."""
        return self.parts > 1 or bool(self.shared_gates)

    @property
    def slots(self) -> int:
        """Slots of a token behind the router's choice: the parts of its experts, and those that every token has."""
        return self.top_k * self.parts + len(self.shared_gates)

    @property
    def has_shared_gates(self) -> bool:
        """Whether a part that every token has is weighted by the token."""
        return any(row >= 0 for row in self.shared_gates)

    @property
    def has_down(self) -> bool:
        """Whether any expert adds something else to the result than through a common left factor."""
        return bool(self.output_formats) or self.factors.own_output or self.biases

    @property
    def gate_up(self) -> Product:
        """The product in front of the activation."""
        results = ("gate", "up") if self.gated else ("up",)
        rows = len(results) * self.width
        return self._product(results, "x_ptr", self.input_formats, self.hidden_size, rows, 1, 0)

    @property
    def down(self) -> Product:
        """The product behind the activation."""
        return self._product(("down",), "hidden_ptr", self.output_formats, self.width, self.hidden_size, 4, 1)

    def _product(
        self,
        results: tuple[str, ...],
        source: str,
        formats: tuple[MatrixFormat, ...],
        columns: int,
        rows: int,
        table: int,
        side: int,
    ) -> Product:
        stride = scale_stride = 0
        if self.width and len(formats) == 1 and not self.scattered[side]:
            stride, scale_stride = stored_sizes(formats[0], rows, columns)
        return Product(results, source, formats, columns, rows, stride, scale_stride, table, self.optional[side])


def padded(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


def stored_sizes(item: MatrixFormat, rows: int, columns: int) -> tuple[int, int]:
    """Elements (numbers, bytes or words) and scales that a matrix [rows, columns] takes, each padded for alignment."""
    extent = padded(columns, item.column_unit)
    groups = extent // item.scale_columns if item.scale_columns else 1
    return padded(rows * extent // item.codes_per_element, WIDTH_UNIT), padded(rows * groups, WIDTH_UNIT) * item.packed
