"""How much a pass changed a model, layer by layer, in float64.

Both versions run side by side. Every layer of the new version starts from what the old one computed so far, so that
each error is caused by its own layer. Layers that did not change are not measured, and of several layers that changed
in the same way, with the same weights as before, one is. Rarely chosen experts are reached by steering tokens to
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment

from moec.artifact.layer_signature import SegmentChange, Signature, compare_segments
from moec.artifact.options import Check
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.ir import Type, Value
from moec.reference.agreement import RouteRecord, compare_routes, record_route, relabelling, tie_tolerance
from moec.reference.executor import Execution, Executor
from moec.reference.frame import Frame, Observation
from moec.reference.layers import Segment, layer_segments, whole
from moec.reference.plan import Step

if TYPE_CHECKING:
    from moec.module import Module


@dataclass(frozen=True)
class LayerChange:
    """What a pass did to one layer.

    relative_error: largest difference of what the layer computes, relative to the largest value, on the given tokens;
    tokens that a tie sends to other experts are left out. expert_error: the same, token by token, on tokens that were
    sent to each router output in turn, and `worst_expert` where it is largest (-1 where there is no difference).
    `experts_reached` of `experts` router outputs were compared in this way. router_differences: tokens that go to other
    experts without a tie. same_as: another layer that changed in the same way and was measured instead of this one.
    """

    layer: str
    relative_error: float
    expert_error: float = 0.0
    worst_expert: int = -1
    experts: int = 0
    experts_reached: int = 0
    router_differences: int = 0
    router_ties: int = 0
    same_as: str = ""

    @property
    def error(self) -> float:
        """The larger one of the two errors."""
        return max(self.relative_error, self.expert_error)


def measure_change(
    before: Module,
    after: Module,
    inputs: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    *,
    check: Check = Check.CHANGED,
    exact: bool = False,
    layerwise: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[LayerChange]:
    """Compares two versions of a model on the inputs of the old and of the new one.

    `inputs` with `attention_mask` [batch, seq] leave padding out of the comparison. `Check.CHANGED` measures layers
    that differ, each kind of change once, `Check.FULL` every layer; unchanged layers are then not in the result.
    `exact`: only whether anything changed is asked, so that a layer may start from the output of any layer before it,
    and those between are not computed. Without `layerwise` the models are compared as wholes.
    Raises what `Executor.run` raises.
    """
    if check is Check.NONE:
        return []
    old, new = _Side(before, dtype), _Side(after, dtype)
    if not layerwise or [segment.name for segment in old.segments] != [segment.name for segment in new.segments]:
        old.segments, new.segments = (whole(side.function.body, side.executor.steps) for side in (old, new))
    differences: list[SegmentChange] | None = None
    if check is Check.CHANGED and before.weights is after.weights:
        differences = compare_segments(old.function, old.segments, new.function, new.segments)
    todo = _todo(differences, len(old.segments))
    if not todo:
        return []
    changes: dict[int, LayerChange] = {}
    with ExitStack() as stack, torch.no_grad():
        for side, given in zip((old, new), inputs, strict=True):
            side.open(stack, given)
        comparison = _Comparison(old, new, _kept(inputs[0]), tie_tolerance(dtype))
        last = max(position for position, like in todo.items() if like is None)
        for position in range(last + 1):
            pair = (old.segments[position], new.segments[position])
            if position in todo and todo[position] is None:
                changes[position] = comparison.measure(*pair)
            elif not (exact and comparison.skip(*pair, _read_later(old, new, todo, position))):
                comparison.carry(*pair)
    for position, like in todo.items():
        if like is not None:
            name = old.segments[position].name
            changes[position] = replace(changes[like], layer=name, same_as=changes[like].layer)
    return [changes[position] for position in sorted(changes)]


def _todo(differences: list[SegmentChange] | None, count: int) -> dict[int, int | None]:
    """Positions to report: None to measure, or the position of the layer that stands for it."""
    if differences is None:
        return dict.fromkeys(range(count))
    measured: dict[Signature, int] = {}
    todo: dict[int, int | None] = {}
    for position, difference in enumerate(differences):
        if difference.unchanged:
            continue
        todo[position] = None
        if difference.abstract is not None:
            first = measured.setdefault(difference.abstract, position)
            todo[position] = first if first != position else None
    return todo


def _read_later(old: _Side, new: _Side, todo: Mapping[int, int | None], position: int) -> set[Value]:
    """What the segments behind a position that will be measured read."""
    measured = [at for at, like in todo.items() if like is None and at > position]
    steps = [step for side in (old, new) for at in measured for step in side.segments[at].steps]
    return {value for step in steps for op in step.op.walk() for value in op.operands}


def _kept(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Boolean [batch, seq]: tokens that are not padding."""
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.to(torch.bool)


class _Side:
    """One version of the model while it runs."""

    def __init__(self, module: Module, dtype: torch.dtype) -> None:
        self.function = module.main
        self.executor = Executor(module.op, module.weights, dtype=dtype)
        self.segments = layer_segments(self.function.body, self.executor.steps)
        self.execution: Execution
        self._routes: list[RouteRecord] = []
        self._forced: Sequence[torch.Tensor] = ()
        self._routed = 0

    def open(self, stack: ExitStack, inputs: Mapping[str, torch.Tensor]) -> None:
        """Begins the run."""
        session = self.executor.session(inputs, observers=[self._observe], steering=self._steer)
        self.execution = stack.enter_context(session)

    def run(
        self, segment: Segment, forced: Sequence[torch.Tensor] = ()
    ) -> tuple[list[torch.Tensor], list[RouteRecord]]:
        """(outputs, routes) of a segment. With `forced`, one tensor [T] per route, the run leaves no trace."""
        values = self.execution.values
        saved = dict(values) if forced else {}
        self._routes, self._forced, self._routed = [], forced, 0
        self.execution.run(segment.steps)
        outputs = [values[value] for value in segment.outputs]
        if forced:
            values.clear()
            values.update(saved)
        return outputs, self._routes

    def assume(self, segment: Segment, outputs: Mapping[Value, torch.Tensor]) -> None:
        """Goes behind a segment without running it."""
        for step in segment.steps:
            for value in step.releases:
                self.execution.values.pop(value, None)
        self.execution.values.update(outputs)

    def _observe(self, observation: Observation) -> None:
        if isinstance(observation.op, RouteOp):
            self._routes.append(record_route(observation))

    def _steer(self, op: RouteOp, choice: torch.Tensor) -> torch.Tensor | None:
        self._routed += 1
        return self._forced[self._routed - 1] if self._forced else None


@dataclass
class _Comparison:
    old: _Side
    new: _Side
    kept: torch.Tensor | None
    tolerance: float
    # outputs of the last computed segment whose type tells them apart
    latest: dict[Type, torch.Tensor] = field(default_factory=dict)

    def measure(self, first: Segment, second: Segment) -> LayerChange:
        """Runs both versions of a segment from the same state; afterwards both stand behind it, in the same state."""
        saved = [dict(side.execution.values) for side in (self.old, self.new)]
        outputs, routes = self.old.run(first)
        new_outputs, new_routes = self.new.run(second)
        behind = [dict(side.execution.values) for side in (self.old, self.new)]
        paired = len(routes) == len(new_routes) and all(
            a.experts == b.experts and a.ids.shape[0] == b.ids.shape[0] for a, b in zip(routes, new_routes, strict=True)
        )
        labels = [relabelling(a, b) for a, b in zip(routes, new_routes, strict=True)] if paired else []
        ties, differences = self._compare_routers(routes, new_routes, labels)
        matches = _match(outputs, new_outputs)
        error = max(
            (_error(*self._tokens(outputs[a], new_outputs[b], ties)) for a, b in matches),
            default=0.0 if not outputs else torch.inf,
        )
        change = LayerChange(
            first.name,
            error,
            router_differences=differences,
            router_ties=int(ties.sum()) if ties is not None else 0,
        )
        for side, values in zip((self.old, self.new), saved, strict=True):
            side.execution.values.clear()
            side.execution.values.update(values)
        if labels and any(isinstance(step.op, ExpertsOp) for step in first.steps):
            change = self._reach_experts(change, (first, second), routes, labels)
        elif not routes and not new_routes:
            change = self._compare_experts(change, first, second)
        for side, values in zip((self.old, self.new), behind, strict=True):
            side.execution.values.clear()
            side.execution.values.update(values)
        for a, b in matches:
            self.new.execution.values[second.outputs[b]] = outputs[a]
        self._remember(first, outputs)
        return change

    def carry(self, first: Segment, second: Segment) -> None:
        """Runs the old version, and gives its outputs to the new one where they are all known."""
        outputs, _ = self.old.run(first)
        self._remember(first, outputs)
        same = [value.type for value in first.outputs] == [value.type for value in second.outputs]
        if same:
            self.new.assume(second, dict(zip(second.outputs, outputs, strict=True)))
            return
        new_outputs, _ = self.new.run(second)
        for a, b in _match(outputs, new_outputs):
            self.new.execution.values[second.outputs[b]] = outputs[a]

    def skip(self, first: Segment, second: Segment, read_later: set[Value]) -> bool:
        """Goes behind a segment as if it gave what came in; False where it gives something else that is read later."""
        sides = ((self.old, first), (self.new, second))
        needed = [[value for value in segment.outputs if value in read_later] for _, segment in sides]
        hidden = [[value for value in segment.outputs if value.type in self.latest] for _, segment in sides]
        if any(value.type not in self.latest for values in needed for value in values):
            return False
        for (side, segment), values in zip(sides, hidden, strict=True):
            if len({value.type for value in values}) != len(values):
                return False
            side.assume(segment, {value: self.latest[value.type] for value in values})
        return True

    def _remember(self, segment: Segment, outputs: list[torch.Tensor]) -> None:
        kinds = [value.type for value in segment.outputs]
        found = {kind: tensor for kind, tensor in zip(kinds, outputs, strict=True) if kinds.count(kind) == 1}
        self.latest = {kind: tensor for kind, tensor in found.items() if tensor.is_floating_point()}

    def _compare_routers(
        self, routes: list[RouteRecord], new_routes: list[RouteRecord], labels: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, int]:
        """(tokens with a tie that changed a selection [T], tokens with another selection and no tie)."""
        ties: torch.Tensor | None = None
        differences = 0
        for before, after, relabelled in zip(routes[: len(labels)], new_routes, labels, strict=True) if labels else ():
            found = compare_routes(before, after, relabelled, self.tolerance)
            wrong = ~found.same & ~found.ties
            if self.kept is not None and self.kept.numel() == len(wrong):
                wrong = wrong & self.kept.flatten()
            differences += int(wrong.sum())
            if ties is None or len(ties) == len(found.ties):
                ties = found.ties if ties is None else ties | found.ties
        return ties, differences

    def _tokens(
        self, a: torch.Tensor, b: torch.Tensor, without: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both restricted to real tokens, those of `without` left out, where a dimension for tokens is recognised."""
        if self.kept is not None and a.ndim >= 3:
            if a.ndim == 4 and a.shape[1:3] != self.kept.shape[1:] and a.shape[2] == self.kept.shape[1]:
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            if a.shape[:2] == self.kept.shape:
                chosen = self.kept
                if without is not None and without.numel() == chosen.numel():
                    chosen = chosen & ~without.reshape(chosen.shape)
                return a[chosen], b[chosen]
        if without is not None and a.ndim == 2 and len(a) == len(without):
            return a[~without], b[~without]
        return a, b

    def _reach_experts(
        self, change: LayerChange, pair: tuple[Segment, Segment], routes: list[RouteRecord], labels: list[torch.Tensor]
    ) -> LayerChange:
        """Runs both versions again, with tokens sent to each router output in turn."""
        experts = max(route.experts for route in routes)
        tokens = len(routes[0].ids)
        usable = torch.arange(tokens)
        if self.kept is not None and self.kept.numel() == tokens:
            usable = usable[self.kept.flatten()]
        reached: set[int] = set()
        worst, worst_expert = 0.0, -1
        for start in range(0, experts, len(usable)):
            turn = torch.full((tokens,), -1, dtype=torch.int64)
            turn[usable] = torch.arange(start, start + len(usable))
            forced = [torch.where(turn < 0, -1, turn % route.experts) for route in routes]
            relabelled = [labels[at][target.clamp_min(0)].where(target >= 0, -1) for at, target in enumerate(forced)]
            outputs, old_routes = self.old.run(pair[0], forced)
            new_outputs, new_routes = self.new.run(pair[1], relabelled)
            arrived = _arrived(old_routes[0], forced[0]) & _arrived(new_routes[0], relabelled[0])
            reached.update(forced[0][arrived].tolist())
            for a, b in _match(outputs, new_outputs):
                if outputs[a].numel() // max(outputs[a].shape[-1], 1) != tokens:
                    continue
                left, right = (x.reshape(tokens, -1) for x in (outputs[a], new_outputs[b]))
                for token in usable.tolist():
                    error = _error(left[token], right[token])
                    if not error <= worst:
                        worst, worst_expert = error, int(forced[0][token])
        return replace(
            change,
            expert_error=worst,
            worst_expert=worst_expert,
            experts=routes[0].experts,
            experts_reached=len(reached),
        )

    def _compare_experts(self, change: LayerChange, first: Segment, second: Segment) -> LayerChange:
        """Compares the expert layers themselves where no `moe.route` can be steered."""
        old, new = ([step for step in segment.steps if isinstance(step.op, ExpertsOp)] for segment in (first, second))
        if len(old) != len(new):
            return change
        for before, after in zip(old, new, strict=True):
            found = _direct_errors(self.old, before, self.new, after)
            if found is None:
                continue
            worst = int(found.argmax())
            change = replace(change, experts=len(found), experts_reached=len(found))
            if float(found[worst]) > change.expert_error:
                change = replace(change, expert_error=float(found[worst]), worst_expert=worst)
        return change


def _arrived(route: RouteRecord, forced: torch.Tensor) -> torch.Tensor:
    """[T]: whether a token was sent somewhere and goes there."""
    return (forced >= 0) & route.selected().gather(1, forced.clamp_min(0)[:, None])[:, 0]


def _direct_errors(old: _Side, before: Step, new: _Side, after: Step) -> torch.Tensor | None:
    """[router outputs]: the error of each on random tokens with gate 1; None where they do not correspond."""
    results = []
    for side, step in ((old, before), (new, after)):
        op = step.op
        assert isinstance(op, ExpertsOp)
        if len(op.stored) != len(before.op.attributes["stored"]):
            return None
        frame = side.execution.frame
        shape, slots = (tuple(frame.size(size) for size in value.type.shape) for value in (op.x, op.ids))  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(frame.settings.types.dtype)
        outputs = []
        for start in range(0, len(op.stored), shape[0]):
            ids = torch.zeros(slots, dtype=torch.int64)
            ids[:, 0] = torch.arange(start, start + shape[0]) % len(op.stored)
            gates = torch.zeros(slots, dtype=x.dtype)
            gates[:, 0] = 1.0
            values = {**frame.values, op.x: x, op.ids: ids, op.gates: gates}
            outputs.append(step.kernel(Frame(frame.settings, frame.symbols, values))[0])
        results.append(torch.cat(outputs)[: len(op.stored)])
    return torch.tensor([_error(a, b) for a, b in zip(*results, strict=True)], dtype=torch.float64)


def _match(old: list[torch.Tensor], new: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Pairs outputs of equal shape and type, such that errors are smallest: passes may reorder what layers share."""
    pairs = []
    kinds = dict.fromkeys((tensor.shape, tensor.dtype) for tensor in old)
    for kind in kinds:
        left = [index for index, tensor in enumerate(old) if (tensor.shape, tensor.dtype) == kind]
        right = [index for index, tensor in enumerate(new) if (tensor.shape, tensor.dtype) == kind]
        costs = torch.tensor([[min(_error(old[a], new[b]), 1e30) for b in right] for a in left], dtype=torch.float64)
        if right:
            rows, columns = linear_sum_assignment(costs.numpy())
            pairs += [(left[row], right[column]) for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
    return sorted(pairs)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |b - a| relative to the largest finite |a|; infinity for NaN. Of integers, the share that differs."""
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float((a != b).to(torch.float64).mean())
    # equal infinities of an additive mask do not differ
    difference = float(torch.where(a == b, 0.0, b - a).abs().max())
    scale = float(a.masked_fill(~a.isfinite(), 0.0).abs().max())
    error = difference / scale if scale else difference
    return error if error == error else torch.inf
