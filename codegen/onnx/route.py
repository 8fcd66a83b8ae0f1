"""`moe.route` in ai.onnx: the thirteen stages in their order, each left out where it is the identity.

Slots hold the selected experts, sorted by descending choice value; ONNX TopK puts the lower index first among equals,
which is the rule of the operation. Where the number of selected experts varies, unused slots have id 0 and gate 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.graph import GraphBuilder
from moec.dialects.moe import (
    BiasUnit,
    ChoiceOn,
    GroupFill,
    GroupScore,
    Normalize,
    NormOver,
    RouteOp,
    Score,
    Select,
    WeightFrom,
)
from moec.dialects.nn import tensor_type
from moec.errors import UnsupportedModelError
from moec.ir.types import DType

NEGATIVE_INFINITY = np.float32(-np.inf)
_FIXED_WIDTH = (Select.TOPK, Select.PER_GROUP_TOPK, Select.SPARSEMIXER)


@dataclass(frozen=True)
class RouteOperands:
    """The operands of `moe.route` in ONNX; None is an absent one. Shapes: logits [T, E] float32, ids int64."""

    logits: ir.Value
    logit_bias: ir.Value | None = None
    mask: ir.Value | None = None
    score_override: ir.Value | None = None
    override_on: ir.Value | None = None
    select_bias: ir.Value | None = None
    forced_ids: ir.Value | None = None
    per_expert_scale: ir.Value | None = None


@dataclass(frozen=True)
class Slots:
    """Of each token: ids int64 [T, K], gates float32 [T, K]; `keep` bool [T, K] marks used slots (None: all)."""

    ids: ir.Value
    gates: ir.Value
    keep: ir.Value | None

    def count(self, builder: GraphBuilder) -> ir.Value:
        """Used slots per token, int64 [T]."""
        keep = self.keep
        if keep is None:
            return builder.op("Expand", builder.op("Shape", self.ids, start=1), builder.size(self.ids, 0))
        return builder.op("ReduceSum", builder.cast(keep, DType.I64), builder.ints(-1), keepdims=0)


def emit_route(builder: GraphBuilder, op: RouteOp, operands: RouteOperands) -> Slots:
    """Emits the operation and returns its slots."""
    return _Route(builder, op, operands).emit()


class _Route:
    """The values that the stages share."""

    def __init__(self, builder: GraphBuilder, op: RouteOp, operands: RouteOperands) -> None:
        self.b = builder
        self.op = op.routing
        self.operands = operands
        self.experts = op.experts
        self.slots = self._static_slots(op)
        # whether a dropped expert can come before a kept one
        self.has_holes = bool(self.op.skip_ratio) or self.op.select is Select.FORCED or op.mask is not None

    def emit(self) -> Slots:
        op = self.op
        self.z = self._logits()
        if op.select is Select.SPARSEMIXER:
            return self._finish(self._sparsemixer())
        self.s = self._score(self.z)
        self._override()
        self.c = self._choice()
        select = {
            Select.TOPK: self._topk,
            Select.PER_GROUP_TOPK: self._per_group_topk,
            Select.FORCED: self._forced,
        }.get(op.select, self._variable)
        ids, values, keep = select()
        return self._finish(Slots(ids, self._gates(ids, values, keep), keep))

    # stages 1 to 8: what experts are worth

    def _logits(self) -> ir.Value:
        b, op, z = self.b, self.op, self.operands.logits
        if op.softcap:
            cap = b.number(op.softcap)
            z = b.op("Mul", b.op("Tanh", b.op("Div", z, cap)), cap)
        bias = self.operands.logit_bias
        if bias is not None:
            if op.bias_unit is BiasUnit.ABS:
                z = b.op("Add", z, bias)
            elif op.bias_unit is BiasUnit.STD:
                z = b.op("Add", z, b.op("Mul", bias, self._standard_deviation(z)))
            else:
                steered = b.op("Add", b.op("ReduceMax", z, b.ints(-1), keepdims=1), bias)
                z = b.op("Where", b.op("Greater", bias, b.number(0.0)), steered, z)
        if op.temperature != 1.0:
            z = b.op("Div", z, b.number(op.temperature))
        if self.operands.mask is not None:
            z = b.op("Where", self.operands.mask, z, b.constant(NEGATIVE_INFINITY))
        return z

    def _standard_deviation(self, z: ir.Value) -> ir.Value:
        """Of the E numbers of each row, with divisor E, [T, 1]."""
        b = self.b
        centred = b.op("Sub", z, b.op("ReduceMean", z, b.ints(-1), keepdims=1))
        return b.op("Sqrt", b.op("ReduceMean", b.op("Mul", centred, centred), b.ints(-1), keepdims=1))

    def _score(self, z: ir.Value) -> ir.Value:
        b = self.b
        match self.op.score:
            case Score.SOFTMAX:
                return b.op("Softmax", z, axis=-1)
            case Score.SIGMOID:
                return b.op("Sigmoid", z)
            case Score.RELU:
                return b.op("Relu", z)
            case Score.SQRT_SOFTPLUS:
                return b.op("Sqrt", b.op("Softplus", z))
            case Score.IDENTITY:
                return z

    def _override(self) -> None:
        b, override, rows = self.b, self.operands.score_override, self.operands.override_on
        if override is None or rows is None:
            return
        rows = b.op("Unsqueeze", rows, b.ints(1))
        self.s = b.op("Where", rows, override, self.s)
        self.z = b.op("Where", rows, b.op("Log", override), self.z)

    def _choice(self) -> ir.Value:
        b, op = self.b, self.op
        c = self.s if op.choice_on is ChoiceOn.SCORE else self.z
        if self.operands.select_bias is not None:
            c = b.op("Add", c, self.operands.select_bias)
        if op.limits_groups:
            c = self._limit_groups(c)
        if self.operands.mask is not None:
            c = b.op("Where", self.operands.mask, c, b.constant(NEGATIVE_INFINITY))
        return c

    def _limit_groups(self, c: ir.Value) -> ir.Value:
        """The choice values with `group_fill` outside the best groups."""
        b, op = self.b, self.op
        grouped = self._by_group(c)
        if op.group_score is GroupScore.MAX:
            group_scores = b.op("ReduceMax", grouped, b.ints(2), keepdims=0)
        else:
            best, _ = b.ops("TopK", grouped, b.ints(min(2, self.experts // op.groups)), outputs=2, axis=-1)
            group_scores = b.op("ReduceSum", best, b.ints(2), keepdims=0)
        _, chosen = b.ops("TopK", group_scores, b.ints(op.topk_groups), outputs=2, axis=-1)
        # [T, topk_groups, 1] == [groups], then any over the chosen ones: which groups stay
        stays = b.op("Equal", b.op("Unsqueeze", chosen, b.ints(2)), b.constant(np.arange(op.groups, dtype=np.int64)))
        stays = b.cast(b.op("ReduceMax", b.cast(stays, DType.I32), b.ints(1), keepdims=0), DType.I1)
        fill = b.constant(NEGATIVE_INFINITY) if op.group_fill is GroupFill.NEG_INF else b.number(0.0)
        masked = b.op("Where", b.op("Unsqueeze", stays, b.ints(2)), grouped, fill)
        return b.reshape(masked, (-1, self.experts))

    def _by_group(self, value: ir.Value) -> ir.Value:
        return self.b.reshape(value, (-1, self.op.groups, self.experts // self.op.groups))

    # stage 9: selection, which gives ids, choice values and used slots

    def _topk(self) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        b, op = self.b, self.op
        first, last = op.rank_offset, op.rank_offset + op.k
        values, ids = b.ops("TopK", self.c, b.ints(last), outputs=2, axis=-1)
        keep = self._drop(ids, None, last)
        if first:
            values, ids = self._columns(values, first, last), self._columns(ids, first, last)
            keep = None if keep is None else self._columns(keep, first, last)
        return ids, values, keep

    def _per_group_topk(self) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        b, op = self.b, self.op
        per_group = op.k // op.groups
        values, local = b.ops("TopK", self._by_group(self.c), b.ints(per_group), outputs=2, axis=-1)
        starts = np.arange(op.groups, dtype=np.int64)[:, None] * (self.experts // op.groups)
        ids = b.reshape(b.op("Add", local, b.constant(starts)), (-1, op.k))
        # groups come in order of their experts, so equal values keep the lower expert first
        values, order = b.ops("TopK", b.reshape(values, (-1, op.k)), b.ints(op.k), outputs=2, axis=-1)
        ids = b.op("GatherElements", ids, order, axis=1)
        return ids, values, self._drop(ids, None, op.k)

    def _forced(self) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        b, forced = self.b, self.operands.forced_ids
        assert forced is not None
        ids = b.op("Max", forced, b.integer(0))
        keep = self._unmasked(ids, b.op("GreaterOrEqual", forced, b.integer(0)))
        return ids, b.op("GatherElements", self.c, ids, axis=1), keep

    def _variable(self) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """topp, entropy, threshold and all: every expert in order, then which of them stay."""
        b, op = self.b, self.op
        values, ids = b.ops("TopK", self.c, b.ints(self.experts), outputs=2, axis=-1)
        if op.select is Select.ALL:
            keep = self._drop(ids, None, self.experts)
        elif op.select is Select.THRESHOLD:
            keep = self._drop(ids, b.op("Greater", values, b.number(op.p)), self.experts)
        else:
            keep = self._drop(ids, self._probable(ids), self.experts)
        if self.slots == self.experts:
            return ids, values, keep
        if keep is not None and self.has_holes:
            ids, values, keep = self._compact(ids, values, keep)
        ids, values = self._columns(ids, 0, self.slots), self._columns(values, 0, self.slots)
        return ids, values, None if keep is None else self._columns(keep, 0, self.slots)

    def _probable(self, ids: ir.Value) -> ir.Value:
        """The prefix of `ids` [T, E] by p, with or without the expert that crosses it, at least k_min; all of an unsure
        row."""
        b, op = self.b, self.op
        scores = b.op("GatherElements", self.s, ids, axis=1)
        if op.take_crossing:
            keep = b.op("Less", b.op("CumSum", scores, b.integer(1), exclusive=1), b.number(op.p))
        else:
            keep = b.op("LessOrEqual", b.op("CumSum", scores, b.integer(1)), b.number(op.p))
        keep = b.op("Or", keep, b.constant(np.arange(self.experts)[None] < op.k_min))
        if op.select is Select.ENTROPY:
            keep = b.op("Or", keep, b.op("Greater", self._entropy(), b.number(op.entropy_threshold)))
        return keep

    def _entropy(self) -> ir.Value:
        """Of the scores, [T, 1]: Shannon's for q = 1, Tsallis' otherwise."""
        b, s, q = self.b, self.s, self.op.entropy_q
        if abs(q - 1) < 1e-6:
            logs = b.op("Log", b.op("Max", s, b.number(1e-12)))
            return b.op("Neg", b.op("ReduceSum", b.op("Mul", s, logs), b.ints(-1), keepdims=1))
        total = b.op("ReduceSum", b.op("Pow", s, b.number(q)), b.ints(-1), keepdims=1)
        return b.op("Div", b.op("Sub", b.number(1.0), total), b.number(q - 1))

    def _drop(self, ids: ir.Value, keep: ir.Value | None, width: int) -> ir.Value | None:
        """Drops masked experts, and every slot but the first whose score is below `skip_ratio` of the first one's."""
        b, op = self.b, self.op
        if op.skip_ratio:
            scores = b.op("GatherElements", self.s, ids, axis=1)
            limit = b.op("Mul", self._columns(scores, 0, 1), b.number(op.skip_ratio))
            first = b.constant((np.arange(width) == 0)[None])
            strong = b.op("Or", b.op("GreaterOrEqual", scores, limit), first)
            keep = strong if keep is None else b.op("And", keep, strong)
        return self._unmasked(ids, keep)

    def _unmasked(self, ids: ir.Value, keep: ir.Value | None) -> ir.Value | None:
        b, mask = self.b, self.operands.mask
        if mask is None:
            return keep
        every_row = b.op("Expand", mask, b.op("Shape", self.operands.logits))
        allowed = b.op("GatherElements", every_row, ids, axis=1)
        return allowed if keep is None else b.op("And", keep, allowed)

    def _sparsemixer(self) -> Slots:
        """PhiMoE, evaluation: the best expert, then the best of the rest, each weighed among those close to it."""
        b, scores = self.b, self.z
        negative = b.constant(NEGATIVE_INFINITY)
        remaining = scores
        ids: list[ir.Value] = []
        gates: list[ir.Value] = []
        for _ in range(2):
            best, index = b.ops("TopK", remaining, b.ints(1), outputs=2, axis=-1)
            factor = b.op("Max", b.op("Abs", scores), best)
            distance = b.op("Div", b.op("Sub", best, scores), factor)
            far = b.op("Greater", distance, b.number(2 * self.op.jitter_eps))
            close = b.op("Softmax", b.op("Where", far, negative, remaining), axis=-1)
            ids.append(index)
            gates.append(b.op("GatherElements", close, index, axis=1))
            remaining = b.op(
                "ScatterElements", remaining, index, b.op("Expand", negative, b.op("Shape", index)), axis=1
            )
        return Slots(b.op("Concat", *ids, axis=1), b.op("Concat", *gates, axis=1), None)

    # stages 10 to 13: gates

    def _gates(self, ids: ir.Value, values: ir.Value, keep: ir.Value | None) -> ir.Value:
        b, op = self.b, self.op
        match op.weight_from:
            case WeightFrom.SCORE:
                # the choice value is the score itself when nothing was added to it or masked
                plain = op.choice_on is ChoiceOn.SCORE and self.c is self.s
                gates = values if plain else b.op("GatherElements", self.s, ids, axis=1)
            case WeightFrom.SOFTMAX_SELECTED:
                plain = op.choice_on is ChoiceOn.LOGIT and self.c is self.z
                logits = values if plain else b.op("GatherElements", self.z, ids, axis=1)
                if keep is not None:
                    logits = b.op("Where", keep, logits, b.constant(NEGATIVE_INFINITY))
                gates = b.op("Softmax", logits, axis=-1)
            case WeightFrom.SIGMOID_LOGIT:
                gates = b.op("Sigmoid", b.op("GatherElements", self.z, ids, axis=1))
            case WeightFrom.ONE:
                gates = b.op("Expand", b.number(1.0), b.op("Shape", ids))
        return gates

    def _finish(self, slots: Slots) -> Slots:
        b, op = self.b, self.op
        ids, gates, keep = slots.ids, slots.gates, slots.keep
        if keep is not None:
            gates = b.op("Where", keep, gates, b.number(0.0))
        if op.normalize is Normalize.SUM and op.norm_over is NormOver.SELECTED:
            gates = self._normalized(gates, keep)
        if op.null_experts:
            real = b.op("Less", ids, b.integer(self.experts - op.null_experts))
            keep = real if keep is None else b.op("And", keep, real)
            gates = b.op("Where", keep, gates, b.number(0.0))
        if op.normalize is Normalize.SUM and op.norm_over is NormOver.TRUE:
            gates = self._normalized(gates, keep)
        scale = self.operands.per_expert_scale
        if scale is not None:
            gates = b.op("Mul", gates, b.op("Gather", scale, ids, axis=0))
        if op.scale != 1.0:
            gates = b.op("Mul", gates, b.number(op.scale))
        if op.offset:
            gates = b.op("Add", gates, b.number(op.offset))
            if keep is not None:
                gates = b.op("Where", keep, gates, b.number(0.0))
        if keep is not None:
            ids = b.op("Where", keep, ids, b.integer(0))
            if op.null_experts or self.has_holes:
                ids, gates, keep = self._compact(ids, gates, keep)
        return self._padded(ids, gates, keep)

    def _padded(self, ids: ir.Value, gates: ir.Value, keep: ir.Value | None) -> Slots:
        """Widens to the static number of slots, which `k_max` may set above k."""
        b, op = self.b, self.op
        missing = self.slots - op.k if op.select in _FIXED_WIDTH else 0
        if not missing:
            return Slots(ids, gates, keep)
        pads = b.ints(0, 0, 0, missing)
        used = b.cast(b.op("GreaterOrEqual", ids, b.integer(0)) if keep is None else keep, DType.I64)
        return Slots(b.op("Pad", ids, pads), b.op("Pad", gates, pads), b.cast(b.op("Pad", used, pads), DType.I1))

    def _normalized(self, gates: ir.Value, keep: ir.Value | None) -> ir.Value:
        b, op = self.b, self.op
        total = b.op("ReduceSum", gates, b.ints(-1), keepdims=1)
        if op.norm_min:
            total = b.op("Max", total, b.number(op.norm_min))
        elif op.norm_eps:
            total = b.op("Add", total, b.number(op.norm_eps))
        elif keep is not None or op.score in (Score.RELU, Score.IDENTITY):
            # a row whose gates are all zero stays zero
            total = b.op("Where", b.op("Equal", total, b.number(0.0)), b.number(1.0), total)
        return b.op("Div", gates, total)

    def _compact(self, ids: ir.Value, gates: ir.Value, keep: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Used slots first, in their order."""
        b = self.b
        used, order = b.ops("TopK", b.cast(keep, DType.I64), b.size(ids, 1), outputs=2, axis=-1)
        ids = b.op("GatherElements", ids, order, axis=1)
        gates = b.op("GatherElements", gates, order, axis=1)
        return ids, gates, b.cast(used, DType.I1)

    def _columns(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        return self.b.op("Slice", value, self.b.ints(start), self.b.ints(stop), self.b.ints(1))

    @staticmethod
    def _static_slots(op: RouteOp) -> int:
        width = tensor_type(op, op.ids, "ids").shape[1]
        if not isinstance(width, int):
            raise UnsupportedModelError(f"a route with {width} slots has no static ONNX form", where=str(op.location))
        return width
