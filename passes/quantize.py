"""Weights in packed formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from moec.experts import (
    Expert,
    FeedForward,
    MoeLayer,
    UnreadableExpertError,
    find_dense_layers,
    find_moe_layers,
    find_unreadable,
    load_dense,
    load_expert,
    replace_dense,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.factoring.sides import Side
from moec.passes.quantizing.blocks import BlockPacker
from moec.passes.quantizing.choices import FormatOptions, Kind, ScaleType, Trits, ZeroPoints
from moec.passes.quantizing.places import What, find_places, pack_place
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.grids import TernaryFit
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix


@register_pass("quantize")
@dataclass(frozen=True)
class Quantize(Pass):
    """Stores weights in packed formats: each matrix [out, in] as codes, and scales for groups of its inputs.

    Integers of 1 to 8 bits, symmetric or with zero points; trits, whose levels are the extremes of a row (QMoE, arXiv
    2310.16795), the scale of least squared error, or the mean absolute value; tables of 16 quantiles (NF4, arXiv
    2305.14314) or of k-means; MXFP4 and NVFP4, whose blocks are given. Routers and norms stay as they are unless
    routers are asked for.

    Bytes count everything that is stored: `bytes-after` times 8 by `weights` are the bits per weight. Matrices that are
    packed or factored already, and protected experts, stay as they are.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    matrices = Statistic("matrices packed")
    weights = Statistic("weights in them")
    bytes_after = Statistic("bytes that they take now, scales and tables included")

    what: tuple[What, ...] = option("weights to pack", (What.EXPERTS,))
    kind: Kind = option("family of formats", Kind.INTEGER)
    bits: int = option("integer, kmeans: bits of a code", 4)
    group: str = option("weights that share a scale: a number of inputs, row, or tensor", "32")
    symmetric: bool = option("integer: zero is the middle of the range", False)
    zero_points: ZeroPoints = option("integer, not symmetric: codes, or numbers", ZeroPoints.INTEGER)
    search: bool = option("integer: shrink ranges where that rounds better", False)
    ternary: TernaryFit = option("ternary: how levels are fitted", TernaryFit.ROW_MINMAX)
    trits: Trits = option("ternary: two bits a trit, or five trits a byte", Trits.TWO_BITS)
    scales: ScaleType = option("type of scales", ScaleType.F32)
    sides: tuple[Side, ...] = option("experts, dense: matrices to pack", tuple(Side))

    def __post_init__(self) -> None:
        self.target()
        if not self.what:
            raise ValueError("give at least one kind of weights, such as what=experts")
        if not self.sides:
            raise ValueError("give at least one of the sides gate, up and down")

    def target(self) -> Target:
        """The format of all matrices; raises ValueError for options that exclude each other."""
        given = {item.name: getattr(self, item.name) for item in fields(FormatOptions)}
        return FormatOptions(**given).target()

    def packs(self, what: What) -> bool:
        """Whether weights of this use are packed."""
        return what in self.what or (What.ALL in self.what and what is not What.ROUTER)

    def run(self, op: Operation, context: PassContext) -> None:
        if self.packs(What.EXPERTS):
            for unreadable in find_unreadable(op):
                context.refuse(unreadable.op, unreadable.reason, self.pass_name)
            for layer in find_moe_layers(op):
                self._pack_experts(layer, context)
        if self.packs(What.DENSE):
            self._pack_blocks(op, context)
        self._pack_places(op, context)

    def _pack_experts(self, layer: MoeLayer, context: PassContext) -> None:
        weights, packer = context.require_weights(), BlockPacker(self.sides, context, self.pass_name)
        new: dict[int, Expert] = {}
        for number in sorted(set(range(layer.expert_count)) - layer.protected):
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            packed = packer.pack(layer.experts, expert, f"{layer.name}, expert {number}", self._round)
            if packed is not None:
                new[number] = packed
        if new:
            changed = replace_experts(layer, weights, new)
            self._count(packer.stored, context)
            context.remark(changed.experts, f"{len(new)} experts packed: {_bits(packer.stored):.3f} bits per weight")

    def _pack_blocks(self, op: Operation, context: PassContext) -> None:
        weights, packer = context.require_weights(), BlockPacker(self.sides, context, self.pass_name)
        for layer in find_dense_layers(op):
            try:
                block = load_dense(layer, weights)
            except UnreadableExpertError as error:
                context.refuse(layer.op, error.message, self.pass_name)
                continue
            packed = packer.pack(layer.op, block, layer.name, self._round)
            if packed is not None:
                replace_dense(layer, weights, packed)
        self._count(packer.stored, context)

    def _pack_places(self, op: Operation, context: PassContext) -> None:
        weights, target = context.require_weights(), self.target()
        for place in find_places(op):
            if self.packs(place.what):
                packed = round_matrix(target, weights.load(place.weight.source), place.weight.weight_name)
                self._count([packed], context)
                pack_place(place, weights, packed)

    def _round(self, weight: torch.Tensor, block: FeedForward, side: Side, where: str) -> Packed:
        return round_matrix(self.target(), weight, where)

    def _count(self, stored: Sequence[Packed], context: PassContext) -> None:
        context.count(self.matrices, len(stored))
        context.count(self.weights, sum(packed.rows * packed.columns for packed in stored))
        context.count(self.bytes_after, sum(packed.nbytes for packed in stored))


def _bits(stored: Sequence[Packed]) -> float:
    """Stored bits per weight."""
    return 8 * sum(packed.nbytes for packed in stored) / sum(packed.rows * packed.columns for packed in stored)
