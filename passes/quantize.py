"""Weights in packed formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import ClassVar

from moec.errors import UsageError
from moec.experts import (
    DenseLayer,
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
from moec.passes.quantizing.blocks import BlockPacker, Part, Rounding
from moec.passes.quantizing.choices import FormatOptions, Kind, ScaleType, Trits, ZeroPoints
from moec.passes.quantizing.inputs import ExpertInputs, Policy
from moec.passes.quantizing.places import What, find_packed, find_places, pack_place
from moec.passes.quantizing.second_order import SecondOrder, SecondOrderOptions
from moec.passes.quantizing.training import train_block
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.bit_plan import ExpertBits
from moec.quantization.grids import TernaryFit
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix
from moec.quantization.second_order import Fallback


class Method(Enum):
    """How weights become codes.

    RTN: each the nearest one. GPTQ: codes that make up for each other's errors on the calibration text. BLOCK_AP: those
    of GPTQ, then codes and scales of an expert trained together.
    """

    RTN = "rtn"
    GPTQ = "gptq"
    BLOCK_AP = "block-ap"


@register_pass("quantize")
@dataclass(frozen=True)
class Quantize(Pass):
    """Stores weights in packed formats: each matrix [out, in] as codes, and scales for groups of its inputs.

    Integers of 1 to 8 bits, symmetric or with zero points, those of 1 bit the signs of weights; trits, whose levels are
    the extremes of a row (QMoE, arXiv 2310.16795), the scale of least squared error, or the mean absolute value; tables
    of 16 quantiles (NF4 of QLoRA) or of k-means; MXFP4 and NVFP4, whose blocks are given. Routers stay as they are
    unless they are asked for, norms always.

    GPTQ takes the second moments of what each expert reads on the calibration text, in float64 and
    with QMoE's damping, ten times that of dense models, because few tokens reach an expert. Its last matrix gets the
    hidden activations of the packed ones before it. Where a moment is not positive definite it is damped more; an
    expert without tokens is rounded to nearest codes, as are matrices outside of feed-forward blocks. The calibration
    decides which tokens count: those that chose the expert, alike (`routed`) or by their gates (`affinity`, MoEQuant),
    every token (`all`), or as many of those that nearly chose it as it has fewer than others (`balanced`, EAQuant).
    `auto` adds all tokens, with the weight of 32, to those that chose it, and `output` counts the latter by the squares
    of their gates, as errors of the layer count. In each of `rounds` codes of integers go on by coordinate descent, and
    scales are fitted to them; with `refit` the last matrix, unless it comes in bands, is first fitted to make up for
    what packing took from those before it.

    `block-ap` goes on from there for integers (EfficientQAT's first phase, one expert at a time): `steps` of Adam on
    the codes, whose rounding passes gradients, and the scales, for the least error of what the expert gives; zero
    points and bands of neurons stay. Every fifth row is held out, and what errs least there counts, the start included.

    Bytes count everything that is stored: `bytes-after` times 8 by `weights` are the bits per weight. Matrices that are
    packed or factored already, and protected experts, stay as they are.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    matrices = Statistic("matrices packed")
    weights = Statistic("weights in them")
    bytes_after = Statistic("bytes that they take now, scales and tables included")
    damped = Statistic("gptq: matrices that needed more damping")
    nearest = Statistic("gptq: matrices rounded to nearest codes all the same")
    trained = Statistic("block-ap: experts that became better on held-out rows")

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
    method: Method = option("how codes are chosen", Method.RTN)
    calibration: Policy = option("gptq: tokens that count for an expert", Policy.AUTO)
    damping: float = option("gptq: what is added to the diagonal of a second moment, as a share of its mean", 0.1)
    act_order: bool = option("gptq: columns, or groups of them, in the order of their inputs' size", True)
    rounds: int = option("gptq, block-ap: how often codes and scales of integers are made better in turn afterwards", 0)
    refit: bool = option("gptq, block-ap: down makes up for what gate and up lose, before it is rounded", False)
    steps: int = option("block-ap: gradient steps for each expert", 100)
    planned: bool = option("experts: integers of the bits that allocate-bits chose", False)

    def __post_init__(self) -> None:
        self.target()
        if not self.what:
            raise ValueError("give at least one kind of weights, such as what=experts")
        if not self.sides:
            raise ValueError("give at least one of the sides gate, up and down")
        if not self.damping > 0:
            raise ValueError(f"damping {self.damping:g} is not above 0")
        if self.steps < 1 or self.rounds < 0:
            raise ValueError("steps must be at least 1, and rounds not negative")
        if self.method is Method.RTN and (self.rounds or self.refit):
            raise ValueError("rounds and refit go on from the codes of method=gptq")
        if self.method is Method.BLOCK_AP and self.kind is not Kind.INTEGER:
            raise ValueError(f"block-ap trains integers, not {self.kind.value}")
        if self.planned and self.kind not in (Kind.INTEGER, Kind.KMEANS):
            raise ValueError(f"weights of kind {self.kind.value} have no bits to choose, as planned needs")

    def target(self, bits: int | None = None) -> Target:
        """The format of all matrices, or of those with other bits; raises ValueError for what cannot be."""
        given = {item.name: getattr(self, item.name) for item in fields(FormatOptions)}
        return FormatOptions(**given if bits is None else {**given, "bits": bits}).target()

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
        self._warn(op, context)

    def _pack_experts(self, layer: MoeLayer, context: PassContext) -> None:
        weights, packer = context.require_weights(), BlockPacker(self.sides, context, self.pass_name)
        inputs = None
        if self.method is not Method.RTN:
            inputs = ExpertInputs(layer, context.require_calibration().sample(layer), self.calibration)
        plan = self._plan(layer, context)
        new: dict[int, Expert] = {}
        for number in sorted(set(range(layer.expert_count)) - layer.protected):
            if plan is not None and plan[number] is None:
                continue
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            rounding: Rounding = self._nearest
            if inputs is not None and isinstance(expert, FeedForward):
                rounding = SecondOrder(self._second_order(), expert, *inputs.rows(number))
            bits = None if plan is None else plan[number]
            packed = packer.pack(layer.experts, expert, f"{layer.name}, expert {number}", rounding, bits)
            self._count_fallbacks(rounding, context)
            if packed is not None:
                new[number] = packed
                if self.method is Method.BLOCK_AP and inputs is not None and isinstance(expert, FeedForward):
                    new[number] = self._trained(expert, packed, inputs, number, context)
        if new:
            changed = replace_experts(layer, weights, new)
            self._count(packer.stored, context)
            context.remark(changed.experts, f"{len(new)} experts packed: {_bits(packer.stored):.3f} bits per weight")

    def _trained(
        self, source: FeedForward, packed: FeedForward, inputs: ExpertInputs, number: int, context: PassContext
    ) -> FeedForward:
        found = train_block(source, packed, *inputs.rows(number), self.steps)
        context.count(self.trained, int(found.after < found.before))
        return found.block

    def _plan(self, layer: MoeLayer, context: PassContext) -> tuple[ExpertBits | None, ...] | None:
        """The bits of the experts of a layer, None where the options say them."""
        if not self.planned:
            return None
        found = None if context.module is None else context.module.bits
        if found is None:
            raise UsageError("there is no plan of bits", hint="put allocate-bits in front of it")
        plan = found.layers.get(layer.name)
        if plan is None or len(plan) != layer.expert_count:
            raise UsageError("the plan of bits does not fit this layer", where=layer.name, hint="allocate bits again")
        return plan

    def _pack_blocks(self, op: Operation, context: PassContext) -> None:
        weights, packer = context.require_weights(), BlockPacker(self.sides, context, self.pass_name)
        for layer in find_dense_layers(op):
            try:
                block = load_dense(layer, weights)
            except UnreadableExpertError as error:
                context.refuse(layer.op, error.message, self.pass_name)
                continue
            rounding = self._rounding_of(layer, block, context)
            packed = packer.pack(layer.op, block, layer.name, rounding)
            self._count_fallbacks(rounding, context)
            if packed is not None:
                replace_dense(layer, weights, packed)
        self._count(packer.stored, context)

    def _pack_places(self, op: Operation, context: PassContext) -> None:
        weights, target = context.require_weights(), self.target()
        for what, packed_op in find_packed(op):
            if self.packs(what):
                reason = f"{packed_op.location.name or packed_op.name}: its {what.value} matrix is packed already"
                context.refuse(packed_op, reason, self.pass_name)
        for place in find_places(op):
            if self.packs(place.what):
                packed = round_matrix(target, weights.load(place.weight.source), place.weight.weight_name)
                self._count([packed], context)
                pack_place(place, weights, packed)

    def _warn(self, op: Operation, context: PassContext) -> None:
        """Tells what was asked for and was not done."""
        packed, refused = context.statistics.get(self.matrices.name, 0), context.refusals
        if refused:
            start = f"weights stay as they are in {len(refused)} places" if packed else "nothing was packed"
            context.warn(op, f"{start}: {refused[0].reason}; --explain names all of them")
        elif not packed:
            wanted = ",".join(what.value for what in self.what)
            context.warn(op, f"nothing was packed: the model has no weights of what={wanted}, or protects them")

    def _rounding_of(self, layer: DenseLayer, block: FeedForward, context: PassContext) -> Rounding:
        """That of a dense block: those beside experts have no calibration of their own."""
        if self.method is Method.RTN or not context.require_calibration().knows(layer):
            return self._nearest
        return SecondOrder(self._second_order(), block, context.require_calibration().sample(layer).x.float())

    def _second_order(self) -> SecondOrderOptions:
        return SecondOrderOptions(
            lambda bits, _: self.target(bits), self.damping, self.act_order, self.rounds, self.refit
        )

    def _nearest(self, part: Part) -> Packed:
        return round_matrix(self.target(part.bits), part.weight, part.where)

    def _count_fallbacks(self, rounding: Rounding, context: PassContext) -> None:
        found = rounding.fallbacks if isinstance(rounding, SecondOrder) else []
        context.count(self.damped, found.count(Fallback.MORE_DAMPING))
        context.count(self.nearest, found.count(Fallback.NEAREST))

    def _count(self, stored: Sequence[Packed], context: PassContext) -> None:
        context.count(self.matrices, len(stored))
        context.count(self.weights, sum(packed.rows * packed.columns for packed in stored))
        context.count(self.bytes_after, sum(packed.nbytes for packed in stored))


def _bits(stored: Sequence[Packed]) -> float:
    """Stored bits per weight."""
    return 8 * sum(packed.nbytes for packed in stored) / sum(packed.rows * packed.columns for packed in stored)
