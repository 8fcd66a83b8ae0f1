"""Lays the weights of a layer out as the kernels read them: a flat tensor for each format, and a table of offsets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch

from moec.codegen.triton.spec import WIDTH_UNIT, Element, Factors, MatrixFormat, padded


class Column(IntEnum):
    """The columns of the table of experts, int64. Offsets count elements of the tensor of the format.

    Those from `ACTIVATION` on are there where a layer has several activations or factored matrices. `GATE_LATENT` and
    `UP_LATENT` are where an expert's numbers begin in a row of the common projections, -1 where its right factor is
    its own; `OUTPUT_LATENT` is the same of the common left factors. Ranks are padded.
    """

    WIDTH = 0
    INPUT_FORMAT = 1
    INPUT_OFFSET = 2
    INPUT_SCALE_OFFSET = 3
    OUTPUT_FORMAT = 4
    OUTPUT_OFFSET = 5
    OUTPUT_SCALE_OFFSET = 6
    BIAS_OFFSET = 7
    ACTIVATION = 8
    INPUT_RANK = 9
    INPUT_RIGHT_ROWS = 10
    INPUT_RIGHT = 11
    INPUT_LEFT = 12
    GATE_LATENT = 13
    UP_LATENT = 14
    OUTPUT_RANK = 15
    OUTPUT_RIGHT = 16
    OUTPUT_LEFT = 17
    OUTPUT_LATENT = 18


FIRST_COLUMNS = int(Column.ACTIVATION)
"""The columns that every table has."""


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix [rows, columns] in a format: numbers, or codes u8 with scales f32 [rows, groups or 1].

    `zeros` is like the scales: zero points in units of a code where the format has them, the second scales of two
    levels. A `shared` matrix is stored once for all experts that have it.
    """

    format: MatrixFormat
    values: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    shared: bool = False

    def below(self, other: CodedMatrix) -> CodedMatrix:
        """The rows of this matrix above those of `other`, which has the same format."""
        parts = zip((self.values, self.scales, self.zeros), (other.values, other.scales, other.zeros), strict=True)
        joined = [None if one is None or two is None else torch.cat([one, two]) for one, two in parts]
        assert joined[0] is not None
        return CodedMatrix(self.format, joined[0], joined[1], joined[2], self.shared and other.shared)

    def extended(self, rows: int, columns: int) -> CodedMatrix:
        """With rows and columns of zeros behind its own."""
        item = self.format
        more = (0, columns - self.values.shape[1], 0, rows - self.values.shape[0])
        values = torch.nn.functional.pad(self.values, more, value=item.middle)
        if self.scales is None:
            return replace(self, values=values)
        groups = columns // item.scale_columns if item.scale_columns else 1
        more = (0, groups - self.scales.shape[1], 0, more[3])
        scales = torch.nn.functional.pad(self.scales, more)
        zeros = None if self.zeros is None else torch.nn.functional.pad(self.zeros, more)
        return CodedMatrix(item, values, scales, zeros, self.shared)


@dataclass(frozen=True)
class Factored:
    """left @ right: `left` [out, r], `right` [r, in]; either may be the same for several experts."""

    left: torch.Tensor
    right: torch.Tensor
    left_is_shared: bool = False
    right_is_shared: bool = False

    @property
    def rank(self) -> int:
        """r, padded."""
        return padded(self.right.shape[0], WIDTH_UNIT)


@dataclass(frozen=True)
class CodedProjection:
    """(whole + factors) @ rows + bias; what is missing is zero."""

    whole: CodedMatrix | None = None
    factors: Factored | None = None
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class CodedExpert:
    """What a slot names: an expert, or some of its neurons. Its real width, its activation's number, its projections.

    Wholes of gate and up have one format.
    """

    width: int
    gate: CodedProjection | None
    up: CodedProjection
    down: CodedProjection
    activation: int = 0

    @property
    def padded_width(self) -> int:
        """The width that kernels compute."""
        return padded(self.width, WIDTH_UNIT if self.down.whole is None else self.down.whole.format.column_unit)


@dataclass(frozen=True)
class PackedExperts:
    """The tensors of a layer's experts by name, and what the kernels are rendered for."""

    tensors: dict[str, torch.Tensor]
    input_formats: tuple[MatrixFormat, ...]
    output_formats: tuple[MatrixFormat, ...]
    widths: tuple[int, ...]
    biases: bool
    factors: Factors
    scattered: tuple[bool, bool]
    optional: tuple[bool, bool]


@dataclass
class _Store:
    """Flat tensors that grow, by name; a shared matrix is found again by its bytes."""

    parts: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    known: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def append(self, name: str, values: torch.Tensor, shared: bool = False) -> int:
        """Puts values behind those of a name, padded for alignment; gives where they start."""
        values = values.reshape(-1)
        key = (name, _digest(values) if shared else b"")
        if shared and key in self.known:
            return self.known[key]
        start = self.sizes.get(name, 0)
        size = padded(len(values), WIDTH_UNIT)
        self.parts.setdefault(name, []).append(torch.nn.functional.pad(values, (0, size - len(values))))
        self.sizes[name] = start + size
        if shared:
            self.known[key] = start
        return start

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, in the order of the names."""
        return {name: torch.cat(items) for name, items in sorted(self.parts.items())}


def pack_experts(experts: Sequence[CodedExpert], hidden_size: int, element: Element) -> PackedExperts:
    """The tensors `table`, one of numbers or codes for each format, its scales and zeros, factors, and `biases`.

    Experts follow one another in each tensor, first the matrices of all first products, then those of the second. So in
    a layer of equal experts each product has a tensor's part of its own with a fixed stride.
    """
    gated = any(expert.gate is not None for expert in experts)
    inputs = [_input_matrix(expert, hidden_size, gated) for expert in experts]
    outputs = [
        None if (whole := expert.down.whole) is None else whole.extended(hidden_size, expert.padded_width)
        for expert in experts
    ]
    input_formats, output_formats = _formats(inputs), _formats(outputs)
    table = torch.zeros(len(experts), len(Column), dtype=torch.int64)
    store = _Store()
    for side, matrices, formats, first in (
        ("input", inputs, input_formats, Column.INPUT_FORMAT),
        ("output", outputs, output_formats, Column.OUTPUT_FORMAT),
    ):
        for number, matrix in enumerate(matrices):
            if matrix is None:
                table[number, first] = -1
                continue
            name = f"{side}_{matrix.format.name}"
            table[number, first] = formats.index(matrix.format)
            table[number, first + 1] = store.append(name, storage(matrix, element), matrix.shared)
            if matrix.scales is not None:
                scales, beside = kernel_scales(matrix)
                table[number, first + 2] = store.append(f"{name}_scales", scales, matrix.shared)
                if beside is not None:
                    second = "shifts" if matrix.format.two_levels else "zeros"
                    store.append(f"{name}_{second}", beside, matrix.shared)
    biased = [any(item.bias is not None for item in _projections(expert)) for expert in experts]
    biases = any(biased)
    none = torch.zeros(2 * max((expert.padded_width for expert in experts), default=0) + hidden_size)
    for number, expert in enumerate(experts):
        table[number, Column.WIDTH] = expert.padded_width
        table[number, Column.ACTIVATION] = expert.activation
        if biases:
            # experts without biases share zeros
            own = _biases(expert, hidden_size, gated) if biased[number] else none
            table[number, Column.BIAS_OFFSET] = store.append("biases", own, shared=not biased[number])
    factors = _pack_factors(experts, hidden_size, element, gated, store, table)
    extended = factors != Factors() or any(expert.activation for expert in experts)
    table = table if extended else table[:, :FIRST_COLUMNS].contiguous()
    sides = (inputs, outputs)
    return PackedExperts(
        {"table": table, **store.tensors()},
        input_formats,
        output_formats,
        tuple(expert.padded_width for expert in experts),
        biases,
        factors,
        scattered=(_is_scattered(inputs), _is_scattered(outputs)),
        optional=(_is_optional(sides[0]), _is_optional(sides[1])),
    )


def storage(matrix: CodedMatrix, element: Element) -> torch.Tensor:
    """The numbers, bytes or words of a matrix whose columns are padded, as one vector."""
    item = matrix.format
    if not item.packed:
        return matrix.values.to(element.torch).reshape(-1)
    if item.bits == 8:
        return (matrix.values.to(torch.int16) - item.middle).to(torch.int8).reshape(-1)
    rows, columns = matrix.values.shape
    words = item.plane_block // item.codes_per_element
    codes = matrix.values.to(torch.int64).reshape(rows, columns // item.plane_block, item.planes, words, 2)
    shifts = torch.arange(item.planes)[:, None, None] * item.bits + torch.tensor([0, 16])
    found = (codes << shifts).sum(dim=(2, 4))
    # the upper half of the words are negative numbers of 32 bits
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32).reshape(-1)


def kernel_scales(matrix: CodedMatrix) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales as one vector, and what is beside them: factors of the sum of rows, or second scales of two levels.

    They are for what kernels read of a code (`MatrixFormat.unit`). A number is scale * read + factor for zero points.
    Blocks of columns follow one another; in a block those of one row are neighbours.
    """
    item = matrix.format
    assert matrix.scales is not None
    scales = matrix.scales * item.unit

    def ordered(values: torch.Tensor) -> torch.Tensor:
        rows = len(values)
        return values.reshape(rows, -1, item.parts).transpose(0, 1).reshape(-1)

    if matrix.zeros is None:
        return ordered(scales), None
    if item.two_levels:
        return ordered(scales), ordered(matrix.zeros * item.unit)
    return ordered(scales), ordered(-scales * (item.zero_code + matrix.zeros / item.unit))


def _projections(expert: CodedExpert) -> tuple[CodedProjection, ...]:
    return (expert.up, expert.down) if expert.gate is None else (expert.gate, expert.up, expert.down)


def _input_matrix(expert: CodedExpert, hidden_size: int, gated: bool) -> CodedMatrix | None:
    """The rows of gate above those of up; what an expert lacks of them is zero."""
    gate = None if expert.gate is None else expert.gate.whole
    known = expert.up.whole or gate
    if known is None:
        return None
    columns = padded(hidden_size, known.format.column_unit)
    found = []
    for matrix in (gate, expert.up.whole) if gated else (expert.up.whole,):
        found.append((_zero_rows(known) if matrix is None else matrix).extended(expert.padded_width, columns))
    return found[0].below(found[1]) if gated else found[0]


def _zero_rows(like: CodedMatrix) -> CodedMatrix:
    """A matrix of the format without rows."""
    scales, zeros = (None if item is None else item[:0] for item in (like.scales, like.zeros))
    return CodedMatrix(like.format, like.values[:0], scales, zeros, like.shared)


def _formats(matrices: Sequence[CodedMatrix | None]) -> tuple[MatrixFormat, ...]:
    found = {matrix.format for matrix in matrices if matrix is not None}
    return tuple(
        sorted(found, key=lambda item: (item.bits, item.middle, item.scale_columns, item.zero_points, item.two_levels))
    )


def _is_scattered(matrices: Sequence[CodedMatrix | None]) -> bool:
    return any(matrix is None or matrix.shared for matrix in matrices)


def _is_optional(matrices: Sequence[CodedMatrix | None]) -> bool:
    return any(matrix is None for matrix in matrices)


def _pack_factors(
    experts: Sequence[CodedExpert],
    hidden_size: int,
    element: Element,
    gated: bool,
    store: _Store,
    table: torch.Tensor,
) -> Factors:
    """Writes the factors of all experts, and their columns of the table."""
    latents: dict[str, list[torch.Tensor]] = {"input": [], "output": []}
    places: dict[tuple[str, bytes], int] = {}

    def common(side: str, matrix: torch.Tensor) -> int:
        key = (side, _digest(matrix))
        if key not in places:
            places[key] = sum(len(item) for item in latents[side])
            latents[side].append(_extended(matrix, padded(len(matrix), WIDTH_UNIT), hidden_size))
        return places[key]

    found = Factors()
    for number, expert in enumerate(experts):
        row = table[number]
        row[[Column.GATE_LATENT, Column.UP_LATENT, Column.OUTPUT_LATENT]] = -1
        sides = [(Column.GATE_LATENT, expert.gate), (Column.UP_LATENT, expert.up)] if gated else []
        sides = sides or [(Column.UP_LATENT, expert.up)]
        given = [None if projection is None else projection.factors for _, projection in sides]
        rank = max((item.rank for item in given if item is not None), default=0)
        if rank:
            width = expert.padded_width
            empty = torch.zeros(0, rank)
            left = torch.cat([_extended(empty if item is None else item.left, width, rank) for item in given])
            row[Column.INPUT_RANK] = rank
            row[Column.INPUT_LEFT] = store.append("input_left", left.to(element.torch), _all_left(given))
            own = False
            for (column, _), item in zip(sides, given, strict=True):
                if item is not None and item.right_is_shared:
                    row[column] = common("input", item.right)
                own |= item is not None and not item.right_is_shared
            if own:
                rights = [torch.zeros(0, hidden_size) if item is None else item.right for item in given]
                right = torch.cat([_extended(item, rank, hidden_size) for item in rights])
                row[Column.INPUT_RIGHT_ROWS] = len(right)
                row[Column.INPUT_RIGHT] = store.append("input_right", right.to(element.torch))
            found = replace(found, input_rank=max(found.input_rank, rank), own_input=found.own_input or own)
        factors = expert.down.factors
        if factors is not None:
            width, rank = expert.padded_width, factors.rank
            row[Column.OUTPUT_RANK] = rank
            right = _extended(factors.right, rank, width).to(element.torch)
            row[Column.OUTPUT_RIGHT] = store.append("output_right", right, factors.right_is_shared)
            if factors.left_is_shared:
                row[Column.OUTPUT_LATENT] = common("output", factors.left.T)
            else:
                left = _extended(factors.left, hidden_size, rank).to(element.torch)
                row[Column.OUTPUT_LEFT] = store.append("output_left", left)
            found = replace(
                found,
                output_rank=max(found.output_rank, rank),
                own_output=found.own_output or not factors.left_is_shared,
            )
    joined = {side: torch.cat(items) for side, items in latents.items() if items}
    if "input" in joined:
        store.append("input_latent", joined["input"].to(element.torch))
        found = replace(found, latent=len(joined["input"]))
    if "output" in joined:
        store.append("output_latent", joined["output"].T.contiguous().to(element.torch))
        found = replace(found, output_latent=len(joined["output"]))
    return found


def _all_left(factors: Sequence[Factored | None]) -> bool:
    return all(item is None or item.left_is_shared for item in factors)


def _extended(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def _digest(values: torch.Tensor) -> bytes:
    content = values.detach().contiguous()
    return hashlib.sha256(repr(tuple(content.shape)).encode() + content.view(torch.uint8).numpy().tobytes()).digest()


def _biases(expert: CodedExpert, hidden_size: int, gated: bool) -> torch.Tensor:
    width = expert.padded_width
    sizes = [(expert.up.bias, width), (expert.down.bias, hidden_size)]
    if gated:
        sizes.insert(0, (None if expert.gate is None else expert.gate.bias, width))
    parts = [torch.zeros(size) for _, size in sizes]
    for part, (bias, _) in zip(parts, sizes, strict=True):
        if bias is not None:
            part[: len(bias)] = bias
    return torch.cat(parts)
