"""Second replicas of the experts of a layer, which slots read by how much they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.dialects.moe import ExpertsOp, ReplicaOp
from moec.experts.classes import Draft, draft_of, rebuild
from moec.experts.expert import Expert
from moec.experts.layer import MoeLayer
from moec.weights.context import WeightContext


def append_experts(layer: MoeLayer, weights: WeightContext, more: Sequence[Expert]) -> MoeLayer:
    """Puts experts behind the stored ones; no router output names them until `stored` is changed."""
    return _appended(layer, weights, [(-1, expert) for expert in more], layer.stored)


def _appended(
    layer: MoeLayer, weights: WeightContext, more: Sequence[tuple[int, Expert]], stored: Sequence[int]
) -> MoeLayer:
    """With (number of the expert that it stands for, expert) behind the stored ones."""
    drafts = [Draft.of(layer, number) for number in range(layer.expert_count)]
    drafts += [draft_of(layer, weights, number, expert) for number, expert in more]
    return rebuild(layer, stored, drafts, shape_of=lambda source: weights.shape_dtype(source)[0])


def add_replicas(
    layer: MoeLayer, weights: WeightContext, replicas: Mapping[int, Expert], high: float, low: float
) -> ExpertsOp:
    """Puts `replicas` of stored experts beside them; `high` and `low` as in `moe.replica`.

    Experts without a replica are read as they are at every rank. The replica of stored expert e is a stored expert of
    its own, behind all others in the order of e. Gives the new operation, which is no `MoeLayer` any more. Raises
    UsageError where there is no store.
    """
    places = {expert: layer.expert_count + place for place, expert in enumerate(sorted(replicas))}
    stored = [*layer.stored, *[places.get(expert, expert) for expert in layer.stored]]
    changed = _appended(layer, weights, [(number, replicas[number]) for number in sorted(replicas)], stored)
    route, experts = changed.route, changed.experts
    choice = ReplicaOp(route.ids, route.gates, outputs=layer.outputs, high=high, low=low, location=experts.location)
    choice.insert_before(experts)
    experts.set_operand(1, choice.chosen_ids)
    experts.set_operand(2, choice.chosen_gates)
    return experts
