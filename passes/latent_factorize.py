"""Matrices of groups of experts with a common factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.errors import UsageError
from moec.experts import (
    Expert,
    FeedForward,
    LowRank,
    MoeLayer,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.factoring.decomposition import (
    RankRule,
    rank_for_parameters,
    rank_for_share,
    require_finite,
    require_rank,
)
from moec.passes.factoring.joint import JointFactors, joint_spectrum, reduce_each, share_left, share_right
from moec.passes.factoring.layers import FactoredLayer, factor_layers
from moec.passes.factoring.sides import Basis, Norms, Side, dense_matrix, parameters, projection, with_matrices
from moec.passes.factoring.whitening import Whitening, average, plain
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Share(Enum):
    """Which factor the experts of a group share: that on the side of the model's width, the right or the left one."""

    OUTER = "outer"
    RIGHT = "right"
    LEFT = "left"

    def is_right(self, side: Side) -> bool:
        """Whether the right factor of a matrix is shared."""
        return side is not Side.DOWN if self is Share.OUTER else self is Share.RIGHT


@register_pass("latent-factorize")
@dataclass(frozen=True)
class LatentFactorize(Pass):
    """Gives groups of experts one projection into a latent space, and each expert a matrix that reads it (MoLE).

    G_e ~ A_e B for the gates of a group, with one B for all, and the same for up; down shares its left factor, where it
    is factored at all (Mixture of Latent Experts, arXiv 2503.23100). The common factor comes from the truncated
    singular value decomposition of the group's matrices, in the norm of the rows that reach them; each expert's own
    factor is then the least squares fit in the norm of its own rows. `own-rank` cuts each matrix by itself first, the
    first of the paper's two phases. A group stores k m r + r d numbers for a side instead of k m d.

    Experts form groups in their order. Group 0 is all experts of a layer; protected ones are in none, so that the last
    group may be smaller.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    factored = Statistic("groups factored, by matrix")
    whole = Statistic("groups left whole because factors would be larger, by matrix")
    before = Statistic("parameters of these experts before")
    after = Statistic("parameters of these experts after")

    rank: int | None = option("rank of every common factor", None)
    ratio: float | None = option("share of the factored matrices' parameters to keep, in place of a rank", None)
    energy: float | None = option("share of the squared singular values to keep, in place of a rank", None)
    group: int = option("experts that share a factor; 0 for all of a layer", 0)
    sides: tuple[Side, ...] = option("matrices to factor", (Side.GATE, Side.UP))
    share: Share = option("factor that is shared; `outer`: right of gate and up, left of down", Share.OUTER)
    basis: Basis = option("norm in which a cut is best; only `plain` needs no calibration", Basis.GATE_WHITENED)
    own_rank: int | None = option("rank that each matrix is cut to by itself first", None)
    damping: float = option("share of the mean eigenvalue that is added to each second moment", 0.01)

    def __post_init__(self) -> None:
        problem = self.rule.problem()
        if problem is None and not self.sides:
            problem = "give at least one of the sides gate, up and down"
        if problem is None and (self.group < 0 or self.group == 1):
            problem = f"a group of {self.group} shares nothing; give 0 or at least 2"
        if problem is None and self.own_rank is not None and self.own_rank < 1:
            problem = f"own-rank {self.own_rank} is below 1"
        if problem is None and not self.damping >= 0:
            problem = f"damping {self.damping:g} is negative"
        if problem is not None:
            raise ValueError(problem)

    @property
    def rule(self) -> RankRule:
        """The rank of a common factor."""
        return RankRule(self.rank, self.ratio, self.energy)

    def run(self, op: Operation, context: PassContext) -> None:
        factor_layers(op, context, self.pass_name, lambda layer: _Layer(self, layer, context).factor())


class _Layer(FactoredLayer):
    """One layer while groups of its experts are factored."""

    def __init__(self, options: LatentFactorize, layer: MoeLayer, context: PassContext) -> None:
        whitened = options.basis is not Basis.PLAIN
        sample = context.require_calibration().sample(layer) if whitened else None
        super().__init__(layer, context, Norms(layer, sample, options.basis, options.damping))
        self.options = options
        self.ranks: dict[Side, list[int]] = {}

    def factor(self) -> None:
        """Factors the groups and says what became of them."""
        context, options = self.context, self.options
        new: dict[int, Expert] = {}
        for numbers in self.groups():
            experts = {number: self.feed_forward(number) for number in numbers}
            shared, changed = self.factored(experts)
            context.count(options.before, sum(map(parameters, experts.values())))
            context.count(options.after, shared + sum(map(parameters, changed.values())))
            new.update(changed)
        op = self.layer.experts
        if self.ranks:
            op = replace_experts(self.layer, self.weights, new).experts
            spans = [f"{side.value} of rank {_span(ranks)}" for side, ranks in self.ranks.items()]
            count = len(next(iter(self.ranks.values())))
            context.remark(op, f"{len(new)} experts share factors in {count} groups: {', '.join(spans)}")
        self.name_starved(op, "the norm is their group's")

    def groups(self) -> list[list[int]]:
        """Stored experts, in groups."""
        layer = self.layer
        free = self.free()
        size = self.options.group or max(len(free), 1)
        if layer.expert_count % size and not layer.protected:
            raise UsageError(
                f"groups of {size} do not divide {layer.expert_count} experts",
                where=layer.name,
                hint="give a divisor of the number of experts, or 0 for one group",
            )
        found = [free[start : start + size] for start in range(0, len(free), size)]
        # one expert alone has nothing to share
        return [numbers for numbers in found if len(numbers) > 1]

    def factored(self, experts: dict[int, FeedForward]) -> tuple[int, dict[int, FeedForward]]:
        """The group with common factors, and how many numbers these hold."""
        shared = 0
        for side in self.options.sides:
            if any(projection(expert, side) is None for expert in experts.values()):
                continue
            matrices = [dense_matrix(expert, side) for expert in experts.values()]
            is_right = self.options.share.is_right(side)
            joint = self.joint(experts, matrices, side, is_right)
            if joint is None:
                self.context.count(self.options.whole)
                continue
            self.context.count(self.options.factored)
            common = (joint.right if is_right else joint.left)[0].float()
            self.ranks.setdefault(side, []).append(joint.right[0].shape[0])
            shared += common.numel()
            for number, left, right in zip(experts, joint.left, joint.right, strict=True):
                factors = (
                    LowRank(left.float(), common, right_is_shared=True)
                    if is_right
                    else LowRank(common, right.float(), left_is_shared=True)
                )
                experts = {**experts, number: with_matrices(experts[number], {side: factors})}
        return shared, experts

    def joint(
        self, experts: dict[int, FeedForward], matrices: list[torch.Tensor], side: Side, is_right: bool
    ) -> JointFactors | None:
        """The factors of one matrix of all experts of the group; None where they would save nothing."""
        where = f"{self.layer.name}, experts {min(experts)} to {max(experts)}, {side.value}"
        common, own = (1, 0) if is_right else (0, 1)
        if len({matrix.shape[common] for matrix in matrices}) > 1:
            raise UsageError(
                "experts of different widths cannot share this factor",
                where=where,
                hint="use share=outer, whose factor has the model's width",
            )
        try:
            for matrix in matrices:
                require_finite(matrix)
            norms = self.group_norms(list(experts), matrices, side)
            if self.options.own_rank is not None:
                require_rank(self.options.own_rank, *matrices[0].shape)
                matrices = reduce_each(matrices, norms, self.options.own_rank)
            rows = sum(matrix.shape[own] for matrix in matrices)
            columns = matrices[0].shape[common]
            rank = self.rank(matrices, norms, is_right, rows, columns)
        except UsageError as error:
            raise UsageError(error.message, where=where, hint=error.hint) from error
        if rank * (rows + columns) >= rows * columns:
            return None
        return (share_right if is_right else share_left)(matrices, norms, rank)

    def rank(
        self, matrices: Sequence[torch.Tensor], norms: Sequence[Whitening], is_right: bool, rows: int, columns: int
    ) -> int:
        """The rank for matrices that are `rows` by `columns` when they are put together."""
        options = self.options
        if options.rank is not None:
            require_rank(options.rank, rows, columns)
            return options.rank
        if options.ratio is not None:
            return rank_for_parameters(options.ratio * rows * columns, rows, columns)
        assert options.energy is not None
        return rank_for_share(joint_spectrum(matrices, norms, right=is_right), options.energy)

    def group_norms(self, numbers: list[int], matrices: list[torch.Tensor], side: Side) -> list[Whitening]:
        """The norm of each expert's rows; one that no row chose gets the mean of the others."""
        known = [self.norms.known(number, side) for number in numbers]
        if self.norms.sample is not None:
            self.norms.starved.update(number for number, norm in zip(numbers, known, strict=True) if norm is None)
        present = [norm for norm in known if norm is not None]
        found = []
        for norm, matrix in zip(known, matrices, strict=True):
            if norm is None and present:
                # what goes into down are an expert's own neurons: of the others' rows only the length says anything
                norm = average(present) if side is not Side.DOWN else plain(matrix.shape[1], _length(present))
            found.append(norm or plain(matrix.shape[1]))
        return found


def _length(norms: Sequence[Whitening]) -> float:
    """The mean eigenvalue of the second moments."""
    return sum(norm.trace for norm in norms) / sum(len(norm.moment) for norm in norms)


def _span(ranks: list[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
