"""Raising of router arithmetic to `moe.route`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.dialects import aten
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.ir import Operation, TensorType, Value, VerifyError
from moec.passes.matching import shape, tensor
from moec.passes.moe_patterns import RouterCheck, RouterReading, UnreadableRouterError, read_router
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
        for experts in [nested for nested in op.walk() if isinstance(nested, ExpertsOp)]:
            if isinstance(experts.ids.defining_op, RouteOp):
                continue
            reason = _raise_router(experts, check)
            context.count(self.kept if reason else self.raised)
            if reason:
                context.refuse(experts, reason, self.pass_name)


def _raise_router(experts: ExpertsOp, check: RouterCheck) -> str:
    """Replaces ids and gates; gives the reason where it cannot."""
    try:
        readings = read_router(experts.ids, experts.gates)
    except UnreadableRouterError as error:
        return str(error)
    problems = []
    for reading in readings:
        route = _route(experts, reading)
        problem = route if isinstance(route, str) else check.problem(experts.ids, experts.gates, reading)
        if isinstance(route, RouteOp) and not problem:
            experts.set_operand(1, route.ids)
            experts.set_operand(2, route.gates)
            # router outputs of null experts lead nowhere
            experts.stored = (*experts.stored, *[-1] * (route.experts - len(experts.stored)))
            return ""
        if isinstance(route, RouteOp):
            _take_back(route)
        problems.append(problem)
    return problems[0]


def _route(experts: ExpertsOp, reading: RouterReading) -> RouteOp | str:
    """The route before `experts`, or why it would be invalid."""
    logits: Value = reading.logits
    tokens, count = tensor(experts.x).shape[0], shape(logits)[-1]
    view: Operation | None = None
    if shape(logits) != (tokens, count):
        kind = TensorType((tokens, count), tensor(logits).dtype)
        view = aten.build("view.default", {"self": logits}, (kind,), experts.location, size=kind.shape)
        view.insert_before(experts)
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
            location=experts.location,
        )
        route.verify_op()
    except VerifyError as error:
        if view is not None:
            view.erase()
        return error.message
    if (route.ids.type, route.gates.type) != (experts.ids.type, experts.gates.type):
        route.drop_all_references()
        if view is not None:
            view.erase()
        return f"the route would give {route.ids.type} and {route.gates.type}"
    route.insert_before(experts)
    return route


def _take_back(route: RouteOp) -> None:
    view = route.logits.defining_op
    route.erase()
    if view is not None and view.name == "aten.view.default" and not view.has_uses:
        view.erase()
