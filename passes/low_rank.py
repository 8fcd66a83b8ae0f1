"""Matrices of experts as products of two thin ones."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.errors import UsageError
from moec.experts import (
    Expert,
    FeedForward,
    LowRank,
    Matrix,
    MoeLayer,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.factoring.decomposition import (
    Decomposition,
    RankRule,
    Split,
    decompose,
    rank_for_parameters,
    require_rank,
    saves,
)
from moec.passes.factoring.fisher import element_importance
from moec.passes.factoring.layers import FactoredLayer, factor_layers
from moec.passes.factoring.partial import neurons_to_keep, ordered, parts
from moec.passes.factoring.shared_base import delta_rank, weighted_base
from moec.passes.factoring.sides import Basis, Norms, Side, dense_matrix, parameters, projection, with_matrices
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Base(Enum):
    """What the experts of a layer share: nothing, or their mean weighted by use or by Fisher information."""

    NONE = "none"
    FREQUENCY = "frequency"
    FISHER = "fisher"


@register_pass("low-rank")
@dataclass(frozen=True)
class LowRankPass(Pass):
    """Stores matrices of experts as products of two thin ones, by singular value decomposition.

    In a whitened basis the cut is the best for what a matrix computes on the calibration text, not for its numbers:
    W S is decomposed, with S S^T the second moment of the rows that reach the expert, times their gates squared where
    the basis is gate-whitened. An expert that no row reached is decomposed as it is.

    With a base each layer stores one mean matrix, and each expert its difference from it at low rank (D2-MoE, arXiv
    2502.17298): far better where experts have a common ancestor, worse where they have none. A ratio counts the base.
    With a residual each expert keeps its neurons of greatest error whole, and the others at low rank: the sparse rows
    of MC-SMoE (arXiv 2310.01334, section 3.2) with the same neurons in all matrices, so that no index is stored.

    A matrix whose factors would hold as many numbers as itself stays whole.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    factored = Statistic("matrices factored")
    whole = Statistic("matrices left whole because factors would be larger")
    before = Statistic("parameters of these experts before")
    after = Statistic("parameters of these experts after")

    rank: int | None = option("rank of every matrix", None)
    ratio: float | None = option("share of the experts' parameters to keep, in place of a rank", None)
    energy: float | None = option("share of the squared singular values to keep, in place of a rank", None)
    basis: Basis = option("norm in which a cut is best; only `plain` needs no calibration", Basis.GATE_WHITENED)
    base: Base = option("mean that the experts of a layer share", Base.NONE)
    residual: float = option("share of each expert's neurons that stay whole", 0.0)
    sides: tuple[Side, ...] = option("matrices to factor", tuple(Side))
    split: Split = option("factor that takes the singular values", Split.SQRT)
    damping: float = option("share of the mean eigenvalue that is added to each second moment", 0.01)

    def __post_init__(self) -> None:
        problem = self.rule.problem()
        if problem is None and not self.sides:
            problem = "give at least one of the sides gate, up and down"
        if problem is None and not 0 <= self.residual < 1:
            problem = f"residual {self.residual:g} is not within [0, 1)"
        if problem is None and self.residual and self.base is not Base.NONE:
            problem = "neurons that stay whole and a base exclude each other"
        if problem is None and self.residual and self.ratio is not None and self.ratio <= self.residual:
            problem = f"ratio {self.ratio:g} leaves nothing beside a residual of {self.residual:g}"
        if problem is None and not self.damping >= 0:
            problem = f"damping {self.damping:g} is negative"
        if problem is not None:
            raise ValueError(problem)

    @property
    def rule(self) -> RankRule:
        """The rank of a matrix."""
        return RankRule(self.rank, self.ratio, self.energy)

    def run(self, op: Operation, context: PassContext) -> None:
        factor_layers(op, context, self.pass_name, lambda layer: _Layer(self, layer, context).factor())


class _Layer(FactoredLayer):
    """One layer while its experts are factored."""

    def __init__(self, options: LowRankPass, layer: MoeLayer, context: PassContext) -> None:
        needs_sample = options.basis is not Basis.PLAIN or options.base is Base.FISHER
        self.sample = context.require_calibration().sample(layer) if needs_sample else None
        whitened = options.basis is not Basis.PLAIN
        super().__init__(
            layer, context, Norms(layer, self.sample if whitened else None, options.basis, options.damping)
        )
        self.options = options
        self.ranks: dict[Side, list[int]] = {}
        self.lost: dict[Side, list[float]] = {}

    def factor(self) -> None:
        """Factors the experts and says what became of them."""
        experts = self.free()
        if not experts:
            return
        if self.options.base is Base.NONE:
            new: dict[int, Expert] = {number: self.alone(number) for number in experts}
            shared = 0
        else:
            new, shared = self.with_base(experts)
        context, options = self.context, self.options
        op = self.layer.experts
        context.count(options.before, sum(parameters(self.feed_forward(number)) for number in experts))
        context.count(options.after, shared + sum(parameters(e) for e in new.values() if isinstance(e, FeedForward)))
        if self.ranks:
            changed = replace_experts(self.layer, self.weights, new)
            context.remark(changed.experts, f"{len(experts)} experts factored: {self.summary()}")
            op = changed.experts
        self.name_starved(op, "their basis is plain")

    def sides_of(self, expert: FeedForward) -> list[Side]:
        """The matrices to factor."""
        return [side for side in self.options.sides if projection(expert, side) is not None]

    def alone(self, number: int) -> FeedForward:
        """An expert with factors of its own."""
        expert = self.feed_forward(number)
        found = {side: self.decomposed(number, expert, side) for side in self.sides_of(expert)}
        if self.options.residual:
            return self.with_whole_neurons(expert, found)
        matrices: dict[Side, Matrix] = {}
        for side, decomposition in found.items():
            rank = self.options.rule.of(decomposition)
            matrix = self.factors(decomposition, rank, side)
            if matrix is not None:
                matrices[side] = matrix
        return with_matrices(expert, matrices)

    def decomposed(self, number: int, expert: FeedForward, side: Side) -> Decomposition:
        """One matrix in its norm."""
        try:
            return decompose(dense_matrix(expert, side), self.norms.of(number, expert, side))
        except UsageError as error:
            where = f"{self.layer.name}, expert {number}, {side.value}"
            raise UsageError(error.message, where=where, hint=error.hint) from error

    def factors(self, decomposition: Decomposition, rank: int, side: Side) -> LowRank | None:
        """A matrix at a rank, None where this saves nothing."""
        outputs, inputs = decomposition.left.shape[0], decomposition.right.shape[1]
        if not saves(rank, outputs, inputs):
            self.context.count(self.options.whole)
            return None
        self.note(side, decomposition, rank, float(decomposition.singular.square().sum()))
        found = decomposition.factors(rank, self.options.split)
        return LowRank(found.left.float(), found.right.float())

    def note(self, side: Side, decomposition: Decomposition, rank: int, energy: float) -> None:
        """Keeps a rank and the share of `energy` that it loses for the remark."""
        self.context.count(self.options.factored)
        self.ranks.setdefault(side, []).append(rank)
        self.lost.setdefault(side, []).append(decomposition.error(rank) / energy if energy else 0.0)

    def summary(self) -> str:
        """Ranks and losses of each side."""
        parts = []
        for side, ranks in self.ranks.items():
            low, high, lost = min(ranks), max(ranks), self.lost[side]
            span = f"{low}" if low == high else f"{low} to {high}"
            parts.append(f"{side.value} to rank {span}, which loses {sum(lost) / len(lost):.2%} of its squared norm")
        return "; ".join(parts)

    def with_whole_neurons(self, expert: FeedForward, found: dict[Side, Decomposition]) -> FeedForward:
        """An expert of which some neurons stay whole and the others get factors."""
        options = self.options
        kept = neurons_to_keep(found, options.rule, options.residual)
        moved, order = ordered(expert, kept)
        matrices: dict[Side, Matrix] = {}
        for side, decomposition in found.items():
            dense = dense_matrix(moved, side)
            cut = parts(dense, decomposition.norm, order, len(kept), side)
            rest = decompose(cut.rest, cut.norm)
            rank = options.rule.of(rest)
            if options.ratio is not None:
                rank = rank_for_parameters(options.ratio * dense.numel() - cut.whole.numel(), *cut.rest.shape)
            factors = self.factors(rest, rank, side)
            if factors is not None:
                matrices[side] = cut.joined(factors)
        return with_matrices(moved, matrices) if matrices else expert

    # -- a base for all --------------------

    def with_base(self, numbers: list[int]) -> tuple[dict[int, Expert], int]:
        """The experts as a shared base and factors of what they are beyond it; and the size of the bases."""
        first = self.feed_forward(numbers[0])
        shapes = {self.shapes(self.feed_forward(number)) for number in numbers}
        if len(shapes) > 1:
            raise UsageError(
                "experts of different widths cannot share a base",
                where=self.layer.name,
                hint="use base=none, or factor before neurons are pruned",
            )
        bases: dict[Side, torch.Tensor] = {}
        for side in self.sides_of(first):
            if self.base_saves(len(numbers), dense_matrix(first, side).shape):
                bases[side] = self.base(numbers, side)
            else:
                self.context.count(self.options.whole, len(numbers))
        new: dict[int, Expert] = {}
        for number in numbers:
            expert = self.feed_forward(number)
            new[number] = with_matrices(
                expert, {side: self.delta(number, expert, side, base, len(numbers)) for side, base in bases.items()}
            )
        return new, sum(base.numel() for base in bases.values())

    def shapes(self, expert: FeedForward) -> tuple[object, ...]:
        """What must be equal for experts that share a base."""
        found = (projection(expert, side) for side in Side)
        return tuple(None if item is None else item.matrix.shape for item in found)

    def base_saves(self, count: int, shape: torch.Size) -> bool:
        """Whether a base and deltas of a given rank hold fewer numbers than `count` matrices."""
        outputs, inputs = shape
        if self.options.rank is None:
            return True
        require_rank(self.options.rank, outputs, inputs)
        return outputs * inputs + count * self.options.rank * (outputs + inputs) < count * outputs * inputs

    def base(self, numbers: list[int], side: Side) -> torch.Tensor:
        """The mean [out, in] of the experts, float32."""
        matrices, importance = [], []
        for number in numbers:
            expert = self.feed_forward(number)
            matrices.append(dense_matrix(expert, side))
            importance.append(self.importance(number, expert, side))
        return weighted_base(matrices, importance).float()

    def importance(self, number: int, expert: FeedForward, side: Side) -> torch.Tensor | float:
        """How much an expert counts in the base."""
        if self.options.base is Base.FISHER:
            assert self.sample is not None
            return element_importance(self.layer, self.sample, number, expert, side)
        return float(self.context.require_calibration().statistics(self.layer).count[number])

    def delta(self, number: int, expert: FeedForward, side: Side, base: torch.Tensor, count: int) -> LowRank:
        """What an expert's matrix is beyond the base."""
        options = self.options
        dense = dense_matrix(expert, side)
        outputs, inputs = dense.shape
        norm = self.norms.of(number, expert, side)
        decomposition = decompose(dense - base, norm)
        energy = norm.error(dense)
        if options.ratio is not None:
            rank = delta_rank(options.ratio, count, outputs, inputs)
        else:
            rank = options.rule.of(decomposition, energy)
        self.note(side, decomposition, rank, energy)
        factors = decomposition.factors(rank, options.split)
        return LowRank(factors.left.float(), factors.right.float(), base)
