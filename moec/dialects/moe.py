"""Routing and experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from moec.dialects.nn import tensor_type, verify_body
from moec.ir.attributes import enum_attribute, struct_attribute
from moec.ir.definition import Attr, Op, Operand, OptionalOperand, Result, VariadicOperand
from moec.ir.operation import Region, Value
from moec.ir.types import DType, TensorType, Type
from moec.ir.verifier import VerifyError


@enum_attribute("moe.bias_unit")
class BiasUnit(Enum):
    """Unit of `logit_bias`: as it is, in standard deviations of the row, or above the row's maximum."""

    ABS = "abs"
    STD = "std"
    MAX = "max"


@enum_attribute("moe.score")
class Score(Enum):
    """How logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    RELU = "relu"
    SQRT_SOFTPLUS = "sqrt_softplus"
    IDENTITY = "identity"


@enum_attribute("moe.choice_on")
class ChoiceOn(Enum):
    """What the choice is made on, before `select_bias` is added."""

    SCORE = "score"
    LOGIT = "logit"


@enum_attribute("moe.group_score")
class GroupScore(Enum):
    """How a group of experts is rated: by its best choice value, or by the sum of its two best."""

    MAX = "max"
    SUM_TOP2 = "sum_top2"


@enum_attribute("moe.group_fill")
class GroupFill(Enum):
    """What the choice value of an expert outside the kept groups becomes."""

    NEG_INF = "neg_inf"
    ZERO = "zero"


@enum_attribute("moe.select")
class Select(Enum):
    """Which experts a token gets; `Routing` explains each."""

    TOPK = "topk"
    PER_GROUP_TOPK = "per_group_topk"
    TOPP = "topp"
    ENTROPY = "entropy"
    THRESHOLD = "threshold"
    ALL = "all"
    FORCED = "forced"
    SPARSEMIXER = "sparsemixer"


@enum_attribute("moe.weight_from")
class WeightFrom(Enum):
    """Where the gates of the selected experts come from."""

    SCORE = "score"
    SOFTMAX_SELECTED = "softmax_selected"
    SIGMOID_LOGIT = "sigmoid_logit"
    ONE = "one"


@enum_attribute("moe.normalize")
class Normalize(Enum):
    """Whether gates are divided by their sum."""

    NONE = "none"
    SUM = "sum"


@enum_attribute("moe.norm_over")
class NormOver(Enum):
    """Whether gates are normalised over all selected experts or only over those that are not null."""

    SELECTED = "selected"
    TRUE = "true"


@struct_attribute("moe.routing")
@dataclass(frozen=True, slots=True)
class Routing:
    """The 13 stages of `moe.route`, in order; every default is the identity.

    1 pre: z = softcap * tanh(z / softcap).  2 bias: z += logit_bias in `bias_unit`.  3 z /= temperature.  4 mask: z =
    -inf. 5 s = score(z).  6 override: rows of s from an operand, z = log s.  7 choice: c = (s or z) + select_bias.
    8 group: only the `topk_groups` best of `groups` groups of experts stay, by `group_score`, the others become
    `group_fill`. 9 select by c descending, ties to the lower index.  10 gates `weight_from`.  11 the last
    `null_experts` columns
    give no expert. 12 normalise: gates / (sum + norm_eps), or / max(sum, norm_min).  13 gates *= per_expert_scale *
    scale, then += offset in the slots that are used.

    Selection: `topk` takes ranks rank_offset .. rank_offset + k; `per_group_topk` k / groups in every group; `topp`
    the shortest prefix whose scores reach p, within k_min .. k_max (without `take_crossing` the longest one whose
    scores do not exceed p); `entropy` the same, but all experts where the Tsallis entropy of order entropy_q is above
    entropy_threshold; `threshold` c > p; `all`; `forced` the ids of an operand (-1 is an empty slot); `sparsemixer`
    top-2 as in PhiMoE with `jitter_eps`, evaluation semantics. `skip_ratio` b drops ranks >= 1 with s < b * s of rank
    0.
    `k_max` 0 means: k for `topk`, `per_group_topk` and `sparsemixer`, the number of experts otherwise.
    """

    softcap: float = 0.0
    bias_unit: BiasUnit = BiasUnit.ABS
    temperature: float = 1.0
    score: Score = Score.SOFTMAX
    choice_on: ChoiceOn = ChoiceOn.SCORE
    groups: int = 1
    topk_groups: int = 0
    group_score: GroupScore = GroupScore.MAX
    group_fill: GroupFill = GroupFill.NEG_INF
    select: Select = Select.TOPK
    k: int = 0
    k_min: int = 1
    k_max: int = 0
    rank_offset: int = 0
    p: float = 0.0
    take_crossing: bool = True
    entropy_q: float = 1.0
    entropy_threshold: float = 0.0
    skip_ratio: float = 0.0
    jitter_eps: float = 0.0
    weight_from: WeightFrom = WeightFrom.SCORE
    null_experts: int = 0
    normalize: Normalize = Normalize.NONE
    norm_over: NormOver = NormOver.SELECTED
    norm_eps: float = 0.0
    norm_min: float = 0.0
    scale: float = 1.0
    offset: float = 0.0

    @property
    def limits_groups(self) -> bool:
        """Whether stage 8 does anything."""
        return self.groups > 1 and 0 < self.topk_groups < self.groups

    def slots(self, experts: int) -> int:
        """Kmax: the static number of slots per token."""
        if self.k_max:
            return self.k_max
        return self.k if self.select in (Select.TOPK, Select.PER_GROUP_TOPK, Select.SPARSEMIXER) else experts

    def problem(self, experts: int) -> str | None:
        """The first rule that the stages break for a number of experts, in words; None where all hold."""
        if self.groups < 1 or experts % self.groups:
            return f"{self.groups} groups do not divide {experts} experts"
        if not 0 <= self.topk_groups <= self.groups:
            return f"topk_groups {self.topk_groups} is not within 0..{self.groups}"
        if self.select in (Select.TOPK, Select.PER_GROUP_TOPK, Select.SPARSEMIXER):
            usable = experts // self.groups * (self.topk_groups or self.groups)
            if not 1 <= self.k <= usable:
                return f"k = {self.k} is not within 1..{usable}"
            if self.rank_offset < 0 or self.rank_offset + self.k > experts:
                return f"rank_offset {self.rank_offset} + k {self.k} exceeds {experts} experts"
        if self.select is Select.PER_GROUP_TOPK and self.k % self.groups:
            return f"{self.groups} groups do not divide k = {self.k}"
        if self.select is Select.SPARSEMIXER and self.k != 2:
            return "sparsemixer selects exactly two experts"
        if self.select in (Select.TOPP, Select.ENTROPY):
            if self.score is not Score.SOFTMAX:
                return f"{self.select.value} needs softmax scores"
            if not 0 < self.p <= 1:
                return f"p = {self.p} is not within (0, 1]"
            if not 1 <= self.k_min <= self.slots(experts) <= experts:
                return f"k_min {self.k_min} and k_max {self.slots(experts)} do not fit {experts} experts"
        if self.select is Select.ENTROPY and self.slots(experts) != experts:
            return "entropy selection may take all experts, so k_max must be their number"
        if self.weight_from is WeightFrom.SOFTMAX_SELECTED and self.normalize is not Normalize.NONE:
            return "softmax_selected gates are normalised already"
        if not 0 <= self.null_experts < experts:
            return f"null_experts {self.null_experts} is not below {experts}"
        if self.norm_over is NormOver.TRUE and not self.null_experts:
            return "norm_over = true needs null experts"
        numbers = (
            self.softcap,
            self.temperature,
            self.scale,
            self.offset,
            self.norm_eps,
            self.norm_min,
            self.skip_ratio,
            self.jitter_eps,
        )
        if (
            not all(map(math.isfinite, numbers))
            or self.temperature <= 0
            or min(self.norm_eps, self.norm_min, self.softcap) < 0
        ):
            return "softcap, temperature, scale, norm_eps and norm_min must be finite and not negative"
        if not 0 < self.slots(experts) <= experts:
            return f"{self.slots(experts)} slots for {experts} experts"
        return None


class RouteOp(Op, name="moe.route", pure=True):
    """All token-choice routing, in the 13 stages of `Routing`.

    `logits` [T, E] float; `logit_bias` [E] or [T, E]; `mask` i1 [E] or [T, E], false = never; `score_override` [T, E]
    on the rows where
    `override_on` i1 [T]; `select_bias` and `per_expert_scale` [E]; `forced_ids` i64 [T, K], -1 = empty slot.
    Results: `ids` i64 [T, K] and `gates` f32 [T, K], the first `count` i64 [T] slots valid and by descending choice;
    empty slots have id 0, gate 0.
    """

    logits = Operand()
    logit_bias = OptionalOperand()
    mask = OptionalOperand()
    score_override = OptionalOperand()
    override_on = OptionalOperand()
    select_bias = OptionalOperand()
    forced_ids = OptionalOperand()
    per_expert_scale = OptionalOperand()
    ids = Result()
    gates = Result()
    count = Result()
    routing = Attr(Routing)

    @property
    def experts(self) -> int:
        """E, null experts included."""
        size = tensor_type(self, self.logits, "logits", 2).shape[1]
        if not isinstance(size, int):
            raise VerifyError(f"{self.name}: the number of experts must be static, not {size}", self)
        return size

    def infer(self) -> Sequence[Type]:
        logits = tensor_type(self, self.logits, "logits", 2)
        experts, tokens = self.experts, logits.shape[0]
        problem = self.routing.problem(experts)
        if problem is not None:
            raise VerifyError(f"{self.name}: {problem}", self)
        for what, value, allowed in (
            ("logit_bias", self.logit_bias, [(experts,), (tokens, experts)]),
            ("mask", self.mask, [(experts,), (tokens, experts)]),
            ("score_override", self.score_override, [(tokens, experts)]),
            ("override_on", self.override_on, [(tokens,)]),
            ("select_bias", self.select_bias, [(experts,)]),
            ("per_expert_scale", self.per_expert_scale, [(experts,)]),
        ):
            if value is not None and tensor_type(self, value, what).shape not in allowed:
                raise VerifyError(f"{self.name}: {what} {value.type} does not fit logits {logits}", self)
        if (self.score_override is None) != (self.override_on is None):
            raise VerifyError(f"{self.name}: score_override and override_on come together", self)
        if self.score_override is not None and self.routing.weight_from is WeightFrom.SOFTMAX_SELECTED:
            raise VerifyError(f"{self.name}: softmax_selected excludes score_override", self)
        slots = self.routing.slots(experts)
        if self.routing.select is Select.FORCED:
            if self.forced_ids is None:
                raise VerifyError(f"{self.name}: forced selection needs forced_ids", self)
            width = tensor_type(self, self.forced_ids, "forced_ids", 2).shape[1]
            if not isinstance(width, int):
                raise VerifyError(f"{self.name}: forced_ids needs a static number of slots", self)
            slots = width
        elif self.forced_ids is not None:
            raise VerifyError(f"{self.name}: forced_ids needs select = forced", self)
        gates = DType.F64 if logits.dtype is DType.F64 else DType.F32
        return [
            TensorType((tokens, slots), DType.I64),
            TensorType((tokens, slots), gates),
            TensorType((tokens,), DType.I64),
        ]


class ReplicaOp(Op, name="moe.replica", pure=True):
    """Which of two replicas of an expert a slot reads, by how much the experts before it count (HOBBIT).

    `ids` i64 [T, K] and `gates` [T, K] are those of a route with R = `outputs` router outputs. The rank of a slot is
    the sum of |gate| over the slots of its token with a larger |gate|, equal ones in their order, divided by that of
    all slots. Up to `high` the id stays, above it the id becomes id + R, which names the expert's other replica; above
    `low` the gate becomes 0, so that the slot gives nothing. Gates that stay are not scaled.
    """

    ids = Operand()
    gates = Operand()
    chosen_ids = Result()
    chosen_gates = Result()
    outputs = Attr(int)
    high = Attr(float)
    low = Attr(float)

    def infer(self) -> Sequence[Type]:
        ids, gates = tensor_type(self, self.ids, "ids", 2), tensor_type(self, self.gates, "gates", 2)
        if ids.shape != gates.shape or not ids.dtype.is_integer:
            raise VerifyError(f"{self.name}: ids {ids} and gates {gates} do not fit each other", self)
        if self.outputs < 1:
            raise VerifyError(f"{self.name}: {self.outputs} router outputs", self)
        if not 0 <= self.high <= self.low <= 1:
            raise VerifyError(
                f"{self.name}: high {self.high:g} and low {self.low:g} are not 0 <= high <= low <= 1", self
            )
        return [ids, gates]


@struct_attribute("moe.class")
@dataclass(frozen=True, slots=True)
class ExpertClass:
    """Experts with one body: their stored ids, in the order of their stacks, and how many weights they take.

    The last `shared` of the weights are whole tensors that all experts of the class read, such as the base of low-rank
    differences; the others are stacks [experts, ...], of which each expert reads its own slice.
    """

    experts: tuple[int, ...]
    operands: int
    shared: int = 0

    @property
    def stacks(self) -> int:
        """How many of the weights are stacks; they come first."""
        return self.operands - self.shared


class ExpertsOp(Op, name="moe.experts", pure=True, regions=None, isolated=True):
    """y[t] = sum over slots of gate * expert(x[t]), with one region per class of experts.

    `x` [T, H], `ids` i64 [T, K] name router outputs, `gates` [T, K]; a slot with gate 0 is empty. `stored[r]` is the
    stored expert of the router output r; several outputs may share one (their gates add), and -1 is a null expert
    that gives nothing. `weights` are those of all classes, in order: of each class first the stacks [experts in the
    class, ...], then what its experts share. The region of a class computes one of its experts on [tokens, H] from one
    slice of each stack and the shared weights as they are. `protected` are stored experts that no pass changes or
    drops, in ascending order.
    """

    x = Operand()
    ids = Operand()
    gates = Operand()
    weights = VariadicOperand()
    y = Result()
    stored = Attr(tuple)
    classes = Attr(tuple)
    protected = Attr(tuple, ())

    @property
    def expert_count(self) -> int:
        """Stored experts."""
        return sum(len(group.experts) for group in self.classes)

    def class_operands(self) -> Iterator[tuple[ExpertClass, tuple[Value, ...], Region]]:
        """(class, its weights, its region) of each class; the first `stacks` of the weights are stacks."""
        start = 0
        for group, region in zip(self.classes, self.regions, strict=True):
            yield group, self.weights[start : start + group.operands], region
            start += group.operands

    def infer(self) -> Sequence[Type]:
        x = tensor_type(self, self.x, "x", 2)
        ids, gates = tensor_type(self, self.ids, "ids", 2), tensor_type(self, self.gates, "gates", 2)
        if ids.shape != gates.shape or ids.shape[0] != x.shape[0] or not ids.dtype.is_integer:
            raise VerifyError(f"{self.name}: ids {ids} and gates {gates} do not fit x {x}", self)
        if not all(isinstance(group, ExpertClass) for group in self.classes) or len(self.classes) != len(self.regions):
            raise VerifyError(f"{self.name} needs one region for each class of experts", self)
        for group in self.classes:
            if not 0 <= group.shared <= group.operands:
                raise VerifyError(f"{self.name}: {group.shared} of {group.operands} weights are shared", self)
        members = sorted(expert for group in self.classes for expert in group.experts)
        if members != list(range(len(members))):
            raise VerifyError(f"{self.name}: the classes must hold each stored expert once, found {members}", self)
        for target in self.stored:
            if type(target) is not int or not -1 <= target < len(members):
                raise VerifyError(f"{self.name}: stored names expert {target!r}, but there are {len(members)}", self)
        ascending = all(type(expert) is int for expert in self.protected) and sorted({*self.protected})
        if ascending != list(self.protected) or not {*self.protected} <= {*members}:
            raise VerifyError(
                f"{self.name}: protected must be ascending stored experts below {len(members)}, "
                f"found {list(self.protected)}",
                self,
            )
        taken = sum(group.operands for group in self.classes)
        if taken != len(self.weights):
            raise VerifyError(f"{self.name}: the classes take {taken} weights, not {len(self.weights)}", self)
        for group, weights, region in self.class_operands():
            given: list[Type] = []
            for value in weights[: group.stacks]:
                stack = tensor_type(self, value, "a stack of weights")
                if not stack.shape or stack.shape[0] != len(group.experts):
                    raise VerifyError(
                        f"{self.name}: the stack {stack} does not hold {len(group.experts)} experts", self
                    )
                given.append(TensorType(stack.shape[1:], stack.dtype))
            given += [value.type for value in weights[group.stacks :]]
            verify_body(self, region, x, given)
        return [x]


class YieldOp(Op, name="moe.yield", terminator=True):
    """Ends the body of an expert."""

    values = VariadicOperand()
