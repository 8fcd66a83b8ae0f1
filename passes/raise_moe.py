"""Raising of router arithmetic to `moe.route`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.moe import ExpertsOp, ReplicaOp, RouteOp
from moec.ir import Operation, TensorType, Value, VerifyError
from moec.passes.matching import shape, tensor
from moec.passes.moe_patterns import (
    DenseExperts,
    RouterCheck,
    RouterReading,
    UnreadableRouterError,
    find_dense_experts,
    make_sparse,
    read_router,
)
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, register_pass


@register_pass("raise-moe")
@dataclass(frozen=True)
class RaiseMoE(Pass):
    """Reads router arithmetic as `moe.route`, and checks the reading by numbers before it replaces anything.

    The stages are found by structure, from the ids and gates of `moe.experts` back to the router logits. Traced
    arithmetic and `moe.route` must then give equal gates on random logits, with the model's own biases. Where they do
    not, or where the arithmetic is no routing that `moe.route` can say, the experts keep what was traced.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    raised = Statistic("routers recognised")
    kept = Statistic("routers left as arithmetic")

    def run(self, op: Operation, context: PassContext) -> None:
        check = RouterCheck(context.weights, context.seed)
        for nested in list(op.walk()):
            reason: str | None = None
            if isinstance(nested, ExpertsOp) and not isinstance(nested.ids.defining_op, RouteOp | ReplicaOp):
                reason = _raise_router(nested, check)
            elif isinstance(nested, AtenOp) and nested.name == "aten.sum.dim_IntList":
                dense = find_dense_experts(nested)
                reason = _raise_dense(dense, check) if dense is not None else None
            if reason is not None:
                context.count(self.kept if reason else self.raised)
            if reason:
                context.refuse(nested, reason, self.pass_name)


def _raise_router(experts: ExpertsOp, check: RouterCheck) -> str:
    """Replaces ids and gates; gives the reason where it cannot."""
    route = _checked_route(experts.ids, experts.gates, experts, check)
    if isinstance(route, str):
        return route
    experts.set_operand(1, route.ids)
    experts.set_operand(2, route.gates)
    # router outputs of null experts lead nowhere
    experts.stored = (*experts.stored, *[-1] * (route.experts - len(experts.stored)))
    return ""


def _raise_dense(dense: DenseExperts, check: RouterCheck) -> str:
    """Replaces experts that run on every token; gives the reason where it cannot."""
    total = dense.total
    scores = aten.build("sigmoid.default", {"self": dense.values}, (dense.values.type,), total.location)
    scores.insert_before(total)
    route = _checked_route(dense.ids, scores.result, total, check)
    scores.erase()
    if isinstance(route, str):
        return route
    make_sparse(dense, route.ids, route.gates)
    return ""


def _checked_route(ids: Value, gates: Value, anchor: Operation, check: RouterCheck) -> RouteOp | str:
    """A route before `anchor` that gives what `ids` [T, K] and `gates` [T, K] are, or the reason why there is none."""
    try:
        readings = read_router(ids, gates)
    except UnreadableRouterError as error:
        return str(error)
    problems = []
    for reading in readings:
        route = _route(reading, ids, gates, anchor)
        problem = route if isinstance(route, str) else check.problem(ids, gates, reading)
        if isinstance(route, RouteOp):
            if not problem:
                return route
            _take_back(route)
        problems.append(problem)
    return problems[0]


def _route(reading: RouterReading, ids: Value, gates: Value, anchor: Operation) -> RouteOp | str:
    """The route before `anchor`, or why it would be invalid."""
    logits: Value = reading.logits
    tokens, count = shape(ids)[0], shape(logits)[-1]
    view: Operation | None = None
    if shape(logits) != (tokens, count):
        kind = TensorType((tokens, count), tensor(logits).dtype)
        view = aten.build("view.default", {"self": logits}, (kind,), anchor.location, size=kind.shape)
        view.insert_before(anchor)
        logits = view.results[0]
    try:
        route = RouteOp(
            logits,
            None,
            None,
            None,
            None,
            reading.select_bias,
            None,
            reading.per_expert_scale,
            routing=reading.routing,
            location=anchor.location,
        )
        route.verify_op()
    except VerifyError as error:
        if view is not None:
            view.erase()
        return error.message
    if (route.ids.type, route.gates.type) != (ids.type, gates.type):
        route.drop_all_references()
        if view is not None:
            view.erase()
        return f"the route would give {route.ids.type} and {route.gates.type}"
    route.insert_before(anchor)
    return route


def _take_back(route: RouteOp) -> None:
    view = route.logits.defining_op
    route.erase()
    if view is not None and view.name == "aten.view.default" and not view.has_uses:
        view.erase()
