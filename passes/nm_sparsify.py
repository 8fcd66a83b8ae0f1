"""Zeros in the matrices of experts, in patterns or anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import ClassVar

import torch

from moec.errors import UnsafeInputError, UsageError
from moec.experts import (
    Dense,
    Expert,
    FeedForward,
    MoeLayer,
    Projection,
    UnreadableExpertError,
    find_moe_layers,
    find_unreadable,
    load_expert,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.merging.least_squares import held_out_rows
from moec.passes.sparsification.inputs import LayerInputs, Matrix
from moec.passes.sparsification.learned import learn_masks
from moec.passes.sparsification.masks import BlockPattern, row_mask
from moec.passes.sparsification.second_order import Chooser, prune_second_order
from moec.passes.sparsification.threshold import Threshold, find_threshold
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.weights.context import WeightContext

UNSTRUCTURED, GLOBAL = "unstructured", "global"
_SECOND_ORDER_BLOCK = 128
_MOST_WAYS = 70
_HELD_OUT = 0.2


class Criterion(Enum):
    """Which weights stay. W is a weight and x its input over the tokens that chose the expert, g the token's gate.

    `magnitude`: |W|. `wanda`: |W| |x|. `gate-wanda`: |W| |g x| (MoE-Pruner). `sparsegpt`: second order, and the weights
    that stay make up for the others; `gate-sparsegpt`: the same with tokens weighted by g². `learned`: patterns chosen
    by gradients of the expert's error, starting at those of `gate-wanda` (MaskLLM).
    """

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    GATE_WANDA = "gate-wanda"
    SPARSEGPT = "sparsegpt"
    GATE_SPARSEGPT = "gate-sparsegpt"
    LEARNED = "learned"

    @property
    def is_second_order(self) -> bool:
        """Whether other weights change, too."""
        return self in (Criterion.SPARSEGPT, Criterion.GATE_SPARSEGPT)

    @property
    def is_gated(self) -> bool:
        """Whether tokens are weighted by their gates."""
        return self in (Criterion.GATE_WANDA, Criterion.GATE_SPARSEGPT, Criterion.LEARNED)


@register_pass("nm-sparsify")
@dataclass(frozen=True)
class NmSparsify(Pass):
    """Sets weights of experts to zero: n of m neighbours of a row stay, or a share of the weights.

    The model does not get smaller: zeros are stored as any weight, and the ledger shows the same bytes. The pattern is
    for hardware and kernels that skip zeros, and for finding out how much of a model is needed.

    1. `pattern=2:4` keeps two of each four neighbouring weights; `unstructured` drops `ratio` of each row; `global`
       drops `ratio` of the weights of all experts together, the lowest ones.
    2. `criterion` says which. All but `magnitude` need a calibration. An expert that none of its tokens chose falls
       back to `magnitude`.
    3. `sparsegpt` and `gate-sparsegpt` are the best by far at 2:4, and need Σ x xᵀ of each expert's input.
    4. `learned` needs n:m. All matrices of an expert learn together, in `steps`, from the rows that chose it but for a
       held-out fifth; learned masks that are no better there are left for those of `gate-wanda`.

    Protected experts stay as they are. Patterns are checked on the result. SparseGPT: arXiv 2301.00774, Wanda: arXiv
    2306.11695, global magnitude: essential sparsity, arXiv 2306.03805.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    weights = Statistic("weights of the experts that were looked at")
    zeros = Statistic("weights of them that are zero now")
    unrouted = Statistic("experts without calibration tokens, pruned by magnitude")
    learned = Statistic("experts whose learned masks are better than those of gate-wanda")

    pattern: str = option("n:m such as 2:4, unstructured, or global", "2:4")
    criterion: Criterion = option("which weights stay", Criterion.MAGNITUDE)
    ratio: float = option("unstructured, global: share of the weights that go", 0.5)
    damping: float = option("sparsegpt: what is added to the diagonal of Σ x xᵀ, as a share of its mean", 0.01)
    steps: int = option("learned: steps of Adam", 100)
    strength: float = option("learned: how far the start is drawn to the patterns of gate-wanda", 3.0)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio {self.ratio:g} is not within 0 <= ratio < 1")
        if self.damping <= 0:
            raise ValueError(f"damping {self.damping:g} is not above 0")
        if self.pattern not in (UNSTRUCTURED, GLOBAL):
            try:
                BlockPattern.parse(self.pattern)
            except ValueError as error:
                raise ValueError(f"{error}, nor {UNSTRUCTURED} or {GLOBAL}") from None
        if self.pattern == GLOBAL and self.criterion.is_second_order:
            raise ValueError(f"{self.criterion.value} scores of different matrices cannot be compared, as global needs")
        if self.steps < 1 or not 0 <= self.strength < math.inf:
            raise ValueError("steps must be at least 1, and strength must not be negative")
        if self.criterion is Criterion.LEARNED:
            blocks = self._block_pattern
            if blocks is None or math.comb(blocks.block, blocks.kept) > _MOST_WAYS:
                raise ValueError(f"learned masks need a pattern n:m with at most {_MOST_WAYS} ways to keep n of m")

    def run(self, op: Operation, context: PassContext) -> None:
        for left in find_unreadable(op):
            context.refuse(left.op, left.reason, self.pass_name)
        chosen = [(layer, self._choose(layer, context)) for layer in find_moe_layers(op)]
        threshold = self._threshold(chosen, context) if self.pattern == GLOBAL else None
        for layer, numbers in chosen:
            self._sparsify(layer, numbers, threshold, context)

    def _choose(self, layer: MoeLayer, context: PassContext) -> list[int]:
        """The stored experts of a layer that get zeros, after a look at their weights."""
        found = []
        for number in sorted(set(range(layer.expert_count)) - layer.protected):
            try:
                expert = load_expert(layer, context.require_weights(), number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            problem = _problem(expert)
            if problem:
                context.refuse(layer.experts, f"stored expert {number}: {problem}", self.pass_name)
                continue
            assert isinstance(expert, FeedForward)
            for matrix, weight in _matrices(expert):
                self._check(weight, f"{layer.name}, {matrix.value} of expert {number}")
            found.append(number)
        return found

    def _check(self, weight: torch.Tensor, where: str) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise UnsafeInputError("a matrix holds NaN or infinity", where=where, hint="the checkpoint is broken")
        pattern = self._block_pattern
        if pattern is not None and weight.shape[1] % pattern.block:
            raise UsageError(
                f"rows of {weight.shape[1]} weights do not divide into blocks of {pattern.block}",
                where=where,
                hint=f"prune-micro-experts{{round-to={pattern.block}}} makes widths that do",
            )

    @property
    def _block_pattern(self) -> BlockPattern | None:
        return None if self.pattern in (UNSTRUCTURED, GLOBAL) else BlockPattern.parse(self.pattern)

    def _inputs(self, layer: MoeLayer, context: PassContext) -> LayerInputs | None:
        if self.criterion is Criterion.MAGNITUDE:
            return None
        return LayerInputs(layer, context.require_calibration().sample(layer), gated=self.criterion.is_gated)

    def _threshold(self, chosen: Sequence[tuple[MoeLayer, list[int]]], context: PassContext) -> Threshold:
        weights = context.require_weights()

        def parts() -> Iterator[torch.Tensor]:
            for layer, numbers in chosen:
                inputs = self._inputs(layer, context)
                for number in numbers:
                    expert = _load(layer, weights, number)
                    for matrix, weight in _matrices(expert):
                        yield _scores(inputs, number, expert, matrix, weight)

        total = sum(part.numel() for part in parts())
        return find_threshold(parts, int(self.ratio * total + 1e-9))

    def _sparsify(
        self, layer: MoeLayer, numbers: Sequence[int], threshold: Threshold | None, context: PassContext
    ) -> None:
        weights, inputs = context.require_weights(), self._inputs(layer, context)
        new: dict[int, Expert] = {}
        total = zeros = 0
        for number in numbers:
            if inputs is not None and not inputs.tokens(number):
                context.count(self.unrouted)
            expert = _load(layer, weights, number)
            masks = self._learned_masks(layer, number, expert, inputs, context)
            changed: dict[Matrix, torch.Tensor] = {}
            for matrix, weight in _matrices(expert):
                if masks is not None:
                    pruned = torch.where(masks[matrix], weight, 0.0)
                elif threshold is not None:
                    scores = _scores(inputs, number, expert, matrix, weight)
                    pruned = torch.where(threshold.mask(scores), weight, 0.0)
                else:
                    pruned = self._prune(inputs, number, expert, matrix, weight)
                total += pruned.numel()
                zeros += int((pruned == 0).sum())
                if self._block_pattern is not None:
                    self._block_pattern.require(pruned, f"{layer.name}, {matrix.value} of expert {number}")
                if not torch.equal(pruned, weight):
                    changed[matrix] = pruned
            if changed:
                new[number] = _with_matrices(expert, changed)
        context.count(self.weights, total)
        context.count(self.zeros, zeros)
        context.remark(layer.experts, f"{zeros} of {total} expert weights are zero; they take as many bytes as before")
        replace_experts(layer, weights, new)

    def _learned_masks(
        self, layer: MoeLayer, number: int, expert: FeedForward, inputs: LayerInputs | None, context: PassContext
    ) -> Mapping[Matrix, torch.Tensor] | None:
        """The masks of an expert where they are learned and a token chose it."""
        pattern = self._block_pattern
        if self.criterion is not Criterion.LEARNED or pattern is None or inputs is None or not inputs.tokens(number):
            return None
        sample = context.require_calibration().sample(layer)
        rows, gates = sample.chosen(layer, number)
        generator = torch.Generator().manual_seed(context.seed)
        found = learn_masks(
            expert,
            {matrix: pattern.mask(_scores(inputs, number, expert, matrix, w)) for matrix, w in _matrices(expert)},
            pattern,
            sample.x[rows].float(),
            gates,
            held_out_rows(sample.sequence[rows], _HELD_OUT, generator),
            steps=self.steps,
            strength=self.strength,
            generator=generator,
        )
        context.count(self.learned, int(found.after < found.before))
        return found.masks

    def _prune(
        self, inputs: LayerInputs | None, number: int, expert: FeedForward, matrix: Matrix, weight: torch.Tensor
    ) -> torch.Tensor:
        """A matrix [out, in] with zeros in blocks or rows."""
        pattern = self._block_pattern
        choose: Chooser = pattern.mask if pattern is not None else partial(row_mask, ratio=self.ratio)
        if self.criterion.is_second_order and inputs is not None:
            block = pattern.block if pattern is not None else _SECOND_ORDER_BLOCK
            return prune_second_order(weight, inputs.moment(number, matrix), choose, block, damping=self.damping)
        return torch.where(choose(_scores(inputs, number, expert, matrix, weight)), weight, 0.0)


def _load(layer: MoeLayer, weights: WeightContext, number: int) -> FeedForward:
    expert = load_expert(layer, weights, number)
    assert isinstance(expert, FeedForward)
    return expert


def _scores(
    inputs: LayerInputs | None, number: int, expert: FeedForward, matrix: Matrix, weight: torch.Tensor
) -> torch.Tensor:
    """|W|, times the norms of its inputs where there are any; float32 [out, in]."""
    if inputs is None or not inputs.tokens(number):
        return weight.abs().float()
    return (weight.abs().double() * inputs.square_sum(number, expert, matrix).sqrt()).float()


def _projection(expert: FeedForward, matrix: Matrix) -> Projection | None:
    return {Matrix.GATE: expert.gate, Matrix.UP: expert.up, Matrix.DOWN: expert.down}[matrix]


def _matrices(expert: FeedForward) -> Iterator[tuple[Matrix, torch.Tensor]]:
    for matrix in Matrix:
        projection = _projection(expert, matrix)
        if projection is not None:
            assert isinstance(projection.matrix, Dense)
            yield matrix, projection.matrix.weight


def _with_matrices(expert: FeedForward, changed: Mapping[Matrix, torch.Tensor]) -> FeedForward:
    def changed_projection(matrix: Matrix, projection: Projection) -> Projection:
        return replace(projection, matrix=Dense(changed[matrix])) if matrix in changed else projection

    gate = None if expert.gate is None else changed_projection(Matrix.GATE, expert.gate)
    up, down = changed_projection(Matrix.UP, expert.up), changed_projection(Matrix.DOWN, expert.down)
    return replace(expert, gate=gate, up=up, down=down)


def _problem(expert: Expert) -> str:
    """Why an expert gets no zeros, in words; empty where it does."""
    if not isinstance(expert, FeedForward):
        return "it has no matrices"
    projections = (_projection(expert, matrix) for matrix in Matrix)
    if any(item is not None and not isinstance(item.matrix, Dense) for item in projections):
        return "its matrices are factored"
    return ""
