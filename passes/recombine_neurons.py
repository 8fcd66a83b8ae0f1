"""Recombination of neurons: experts are dropped, and their neurons join similar ones of the experts that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.dialects.moe import Score
from moec.errors import UnsafeInputError
from moec.experts import (
    MoeLayer,
    UnreadableExpertError,
    alias_experts,
    find_moe_layers,
    find_unreadable,
    load_expert,
    replace_experts,
    slice_experts,
)
from moec.ir import Operation
from moec.passes.merging import (
    ClusterStart,
    NeuronTable,
    RouterChange,
    UnmergeableExpertError,
    experts_to_keep,
    join_router_outputs,
    keep_problem,
    recombine,
    require_room,
    strongest_of,
)
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


@register_pass("recombine-neurons")
@dataclass(frozen=True)
class RecombineNeurons(Pass):
    """Drops the experts of least gate mass, and moves those of their neurons that have a like into other experts.

    After DERN (Dropping Experts, Recombining Neurons; EMNLP 2025). In our measurements it was never better than the
    pruning that it starts from; `merge-experts` or pruning with `refit-down` are the better choice.

    1. Experts of the largest gate mass stay, and protected ones.
    2. Each neuron of an expert that goes is assigned to the expert that has the neuron of the most similar up row and
       down column, if their cosine is above `tau`; the others are lost.
    3. Experts that received neurons are clustered back to their width by k-means of directions; a cluster becomes the
       mean of its neurons, weighted by the gate masses of the experts they are from.
    4. `router=keep-row` drops the router outputs of the experts that go; `log-sum-exp` adds their mass to the
       receivers, in the shares of neurons received; `alias` sends them to the expert that received most.

    Protected experts receive nothing. With `tau` above all cosines this is pruning by gate mass.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    dropped = Statistic("experts dropped")
    moved = Statistic("neurons moved")
    lost = Statistic("neurons lost")
    changed = Statistic("experts that received neurons")

    keep: float = option("experts that stay in each layer: a number, or a share below 1")
    tau: float = option("cosine above which a neuron is moved", 0.6)
    use_gate: bool = option("gate rows count in the cosine, too", False)
    start: ClusterStart = option("where the clusters of an expert begin", ClusterStart.OWN)
    router: RouterChange = option("what becomes of the router outputs of experts that go", RouterChange.KEEP_ROW)

    def __post_init__(self) -> None:
        problem = keep_problem(self.keep)
        if problem is not None:
            raise ValueError(problem)
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau {self.tau:g} is no cosine")

    def run(self, op: Operation, context: PassContext) -> None:
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        for layer in find_moe_layers(op):
            self._shrink(layer, context)

    def _shrink(self, layer: MoeLayer, context: PassContext) -> None:
        calibration, weights = context.require_calibration(), context.require_weights()
        mass = [float(value) for value in calibration.statistics(layer).gate_mass]
        count = experts_to_keep(self.keep, layer.expert_count)
        minimum = 1 if self.router is RouterChange.ALIAS else layer.top_k
        require_room(layer.name, count, layer.expert_count, minimum, 0, len(layer.protected))
        staying = strongest_of(mass, count, layer.protected)
        going = [expert for expert in range(layer.expert_count) if expert not in staying]
        if not going:
            return
        if self.router is RouterChange.LOG_SUM_EXP and layer.route.routing.score is not Score.SOFTMAX:
            score = layer.route.routing.score.value
            reason = f"log-sum-exp adds up masses of a softmax, but its router scores by {score}"
            context.refuse(layer.experts, reason, self.pass_name)
            return
        try:
            tables = {expert: self._table(layer, expert, context) for expert in (*staying, *going)}
        except (UnmergeableExpertError, UnreadableExpertError) as error:
            context.refuse(layer.experts, str(error), self.pass_name)
            return
        result = recombine(
            [None if expert in layer.protected else tables[expert] for expert in staying],
            [tables[expert] for expert in going],
            [mass[expert] for expert in staying],
            [mass[expert] for expert in going],
            tau=self.tau,
            use_gate=self.use_gate,
            start=self.start,
            generator=torch.Generator().manual_seed(context.seed),
        )
        new = {
            expert: table.expert() for expert, table in zip(staying, result.tables, strict=True) if table is not None
        }
        moved = int(result.received.sum())
        lost = sum(tables[expert].width for expert in going) - moved
        context.count(self.dropped, len(going))
        context.count(self.moved, moved)
        context.count(self.lost, lost)
        context.count(self.changed, len(new))
        context.remark(
            layer.experts,
            f"{len(staying)} of {layer.expert_count} experts stay; {moved} neurons moved into {len(new)} of them, "
            f"{lost} lost",
        )
        if self.router is RouterChange.LOG_SUM_EXP:
            groups, shares = _receivers(layer, staying, going, result.received)
            layer = join_router_outputs(layer, weights, calibration.sample(layer), groups, shares)
        layer = replace_experts(layer, weights, new)
        kept = set(staying)
        if self.router is RouterChange.ALIAS:
            best = {
                expert: staying[int(counts.argmax())]
                for expert, counts in zip(going, result.received, strict=True)
                if int(counts.sum())
            }
            rows = [output for output, expert in enumerate(layer.stored) if expert < 0 or expert in kept | set(best)]
            layer = alias_experts(layer, [best.get(expert, expert) for expert in layer.stored])
        else:
            rows = [output for output, expert in enumerate(layer.stored) if expert < 0 or expert in kept]
        slice_experts(layer, rows)

    def _table(self, layer: MoeLayer, expert: int, context: PassContext) -> NeuronTable:
        table = NeuronTable.of(load_expert(layer, context.require_weights(), expert))
        if not table.is_finite:
            raise UnsafeInputError(
                "an expert has weights that are no finite numbers",
                where=f"{layer.name}, stored expert {expert}",
                hint="the checkpoint is broken; download or save it again",
            )
        return table


def _receivers(
    layer: MoeLayer, staying: tuple[int, ...], going: list[int], received: torch.Tensor
) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[float, ...]]]:
    """For the first router output of each receiver: the outputs whose mass goes there, and in which shares."""
    groups, shares = {}, {}
    totals = received.sum(dim=1)
    for place, expert in enumerate(staying):
        outputs = layer.outputs_of(expert)
        members, weights = [outputs[0]], [1.0]
        for source, counts, total in zip(going, received, totals, strict=True):
            if int(counts[place]):
                more = layer.outputs_of(source)
                members += more
                weights += [int(counts[place]) / int(total)] * len(more)
        groups[outputs[0]], shares[outputs[0]] = tuple(members), tuple(weights)
    return groups, shares
