"""Trits of experts in fewer bits than two, without loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from moec.dialects.quant import Span, Ternary, TritPacking
from moec.experts import (
    Expert,
    FeedForward,
    Matrix,
    MoeLayer,
    Offset,
    Quantized,
    UnreadableExpertError,
    find_moe_layers,
    find_unreadable,
    load_expert,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.dictionary import Dictionary, build_dictionary
from moec.quantization.packed import Packed
from moec.quantization.trits import encoded, padded, repacked, zero_share
from moec.weights.context import WeightContext

_CODE_BITS = (8, 10, 12, 16)
_SHARE_STEP = 0.005
_OFFSET_BYTES = 4


@register_pass("encode-ternary")
@dataclass(frozen=True)
class EncodeTernary(Pass):
    """Stores the trits of experts as codes of a dictionary of their most probable runs (QMoE, arXiv 2310.16795).

    1. One dictionary serves the model: the 2^b runs of up to 14 pairs that are most probable if trits are zero as often
       as these are, and both signs are alike. Without `code-bits` the size is the one of 8, 10, 12 and 16 bits whose
       streams and table together are smallest, measured on the first expert of each layer.
    2. The same matrix of all experts of a layer is packed alike: as a stream if that is smallest, else five trits in a
       byte or two bits each. Streams of a layer are filled up to the longest one, so that experts stay in one stack.
    3. If streams save less than the table takes, none are made.

    Signs that experts add to a base (`sparsify-delta`) are ternary, too. Levels stay as they are; what the experts
    compute does not change.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    streams = Statistic("matrices that are streams of codes now")
    packed = Statistic("matrices that are packed in another way now")
    weights = Statistic("weights in all ternary matrices")
    before = Statistic("bytes of them before")
    after = Statistic("bytes of them after, the table included")

    code_bits: int | None = option("bits of a code, 4 to 16", None)
    zero_share: float | None = option("probability of zero that the dictionary is made for; without, the share", None)

    def __post_init__(self) -> None:
        if self.code_bits is not None and not 4 <= self.code_bits <= 16:
            raise ValueError(f"code-bits {self.code_bits} is not within 4..16")
        if self.zero_share is not None and not 0 < self.zero_share < 1:
            raise ValueError(f"zero-share {self.zero_share:g} is not within (0, 1)")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        layers = find_moe_layers(op)
        survey = _Survey()
        for layer in layers:
            for _, side, found in _trits(layer, weights):
                survey.add(layer, side, found)
        if not survey.weights:
            context.remark(op, "no expert has a ternary matrix")
            return
        dictionary = self._dictionary(survey)
        plans = [_LayerPlan(layer, weights, dictionary) for layer in layers]
        for plan in plans:
            for _, side, found in _trits(plan.layer, weights):
                plan.measure(side, found)
        saved = sum(plan.saved() for plan in plans)
        table_bytes = dictionary.table().nbytes
        with_streams = saved > table_bytes
        for plan in plans:
            plan.rewrite(context, self, with_streams)
        context.count(self.weights, survey.weights)
        context.count(self.before, survey.bytes)
        after = sum(plan.after for plan in plans) + (table_bytes if with_streams else 0)
        context.count(self.after, after)
        words = f"{dictionary.code_bits}-bit codes for {dictionary.zero_share:.3f} of zeros"
        if not with_streams:
            words = f"streams would save {saved} bytes, less than the {table_bytes} of their table"
        context.remark(op, f"{words}: {8 * after / survey.weights:.3f} bits per weight")

    def _dictionary(self, survey: _Survey) -> Dictionary:
        """The dictionary of the fewest bytes."""
        share = self.zero_share
        if share is None:
            share = round(survey.zeros / survey.weights / _SHARE_STEP) * _SHARE_STEP
            share = min(max(share, _SHARE_STEP), 1 - _SHARE_STEP)
        sizes = _CODE_BITS if self.code_bits is None else (self.code_bits,)
        candidates = [build_dictionary(bits, share) for bits in sizes]
        return min(candidates, key=survey.size_with)


@dataclass
class _Survey:
    """Sums over all ternary matrices, and one of each layer and side to measure rates on."""

    weights: int = 0
    zeros: float = 0.0
    bytes: int = 0
    examples: dict[tuple[int, Side], Packed] = field(default_factory=dict)

    def add(self, layer: MoeLayer, side: Side, found: Packed) -> None:
        """Takes one matrix into account."""
        size = found.rows * found.columns
        self.weights += size
        self.zeros += zero_share(found) * size
        self.bytes += found.nbytes
        self.examples.setdefault((layer.index, side), found)

    def size_with(self, dictionary: Dictionary) -> float:
        """Bytes of all streams, by the rate on the examples, and of the table."""
        table = dictionary.table()
        measured = sum(encoded(found, dictionary, table).codes.nbytes for found in self.examples.values())
        seen = sum(found.rows * found.columns for found in self.examples.values())
        return measured / seen * self.weights + table.nbytes


@dataclass
class _LayerPlan:
    """What the matrices of one layer become: `sizes` are the longest stream of each side and shape."""

    layer: MoeLayer
    weights: WeightContext
    dictionary: Dictionary
    sizes: dict[tuple[Side, tuple[int, int]], list[int]] = field(default_factory=dict)
    after: int = 0

    def measure(self, side: Side, found: Packed) -> None:
        """Notes the length of one stream."""
        stream = encoded(found, self.dictionary, self.dictionary.table())
        self.sizes.setdefault((side, found.shape), []).append(len(stream.codes))

    def saved(self) -> int:
        """Bytes that streams save against the best other packing, where they do."""
        return sum(max(0, gain) for gain in map(self._gain, self.sizes))

    def _gain(self, key: tuple[Side, tuple[int, int]]) -> int:
        lengths, (_, (rows, columns)) = self.sizes[key], key
        plain = min(rows * Ternary(packing=packing).row_bytes(columns) for packing in TritPacking)
        return len(lengths) * (plain - max(lengths) - _OFFSET_BYTES * (rows + 1))

    def rewrite(self, context: PassContext, options: EncodeTernary, with_streams: bool) -> None:
        """Packs the matrices anew."""
        packed: dict[int, dict[Side, Quantized]] = {}
        for number, side, found in _trits(self.layer, self.weights):
            new = self._packed(side, found, with_streams)
            self.after += new.nbytes - (0 if new.table is None else new.table.nbytes)
            if new.format != found.format:
                context.count(options.packed if new.table is None else options.streams)
                packed.setdefault(number, {})[side] = Quantized(new, table_is_shared=new.table is not None)
        changed: dict[int, Expert] = {}
        for number, sides in packed.items():
            expert = load_expert(self.layer, self.weights, number)
            assert isinstance(expert, FeedForward)
            matrices: dict[Side, Matrix] = {}
            for side, new_part in sides.items():
                old = projection(expert, side)
                assert old is not None
                matrices[side] = replace(old.matrix, delta=new_part) if isinstance(old.matrix, Offset) else new_part
            changed[number] = with_matrices(expert, matrices)
        replace_experts(self.layer, self.weights, changed)

    def _packed(self, side: Side, found: Packed, with_streams: bool) -> Packed:
        key = (side, found.shape)
        if with_streams and self._gain(key) > 0:
            stream = encoded(found, self.dictionary, self.dictionary.table())
            return padded(stream, max(self.sizes[key]))
        assert isinstance(found.format, Ternary)
        best = min(TritPacking, key=lambda packing: Ternary(packing=packing).row_bytes(found.columns))
        return repacked(found, best)


def _trits(layer: MoeLayer, weights: WeightContext) -> Iterator[tuple[int, Side, Packed]]:
    """(stored expert, side, matrix) of the ternary matrices whose levels are those of rows or of the whole."""
    for number in sorted(set(range(layer.expert_count)) - layer.protected):
        try:
            expert = load_expert(layer, weights, number)
        except UnreadableExpertError:
            continue
        if not isinstance(expert, FeedForward):
            continue
        for side in Side:
            found = _packed_part(expert, side)
            if found is not None:
                kind = found.packed.format
                if isinstance(kind, Ternary) and kind.span is not Span.GROUP:
                    yield number, side, found.packed


def _packed_part(expert: FeedForward, side: Side) -> Quantized | None:
    """A packed matrix, or what an expert adds to the base of its class."""
    found = projection(expert, side)
    matrix = None if found is None else found.matrix
    if isinstance(matrix, Offset):
        return matrix.delta
    return matrix if isinstance(matrix, Quantized) else None
