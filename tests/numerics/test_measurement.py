"""What the ledger measures: each kind of change that a pass can make to a layer, honest or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moec.artifact.measurement import LayerChange, measure_change
from moec.artifact.options import Check
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp, Normalize, RouteOp, Routing, WeightFrom
from moec.frontend.huggingface import load_huggingface
from moec.ir import Location
from moec.module import Module
from moec.pipeline.manager import PassManager, Pipeline
from moec.reference.agreement import compare_routes, relabelling, routing_margin, tie_tolerance
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.reference.route import RouteInputs
from moec.weights.context import WeightContext
from moec.weights.expression import Expression
from moec.weights.store import WeightStore
from tests.frontend.tiny_models import random_tokens, save_tiny_checkpoint
from tests.numerics.language_models import inputs_of

EXACT = 1e-9
LAYERS = 4
# so few tokens that they leave experts out
IDS = random_tokens(1, 3, seed=3)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """A tiny Qwen3-MoE as the frontend gives it."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny_checkpoint("qwen3_moe", folder, num_hidden_layers=LAYERS)
    return load_huggingface(folder, WeightStore(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def raised(traced: Module) -> Module:
    """The same with `moe.route`."""
    module = copy_of(traced)
    run_passes(module, "canonicalize,cse,dce,raise-nn,raise-moe,canonicalize,cse,dce")
    assert module.operation_counts()["moe.route"] == LAYERS
    return module


def copy_of(module: Module) -> Module:
    return replace(module, op=module.op.clone())  # type: ignore[arg-type]


def run_passes(module: Module, text: str) -> None:
    PassManager(Pipeline.parse(text)).run(module.op, weights=module.weights, module=module)


def measured(before: Module, after: Module, check: Check = Check.CHANGED, ids: torch.Tensor = IDS) -> list[LayerChange]:
    mask = torch.ones_like(ids)
    return measure_change(before, after, (inputs_of(before, ids, mask), inputs_of(after, ids, mask)), check=check)


def expert_layer(module: Module, layer: int) -> tuple[RouteOp | None, ExpertsOp]:
    experts = [op for op in module.main.walk() if isinstance(op, ExpertsOp)][layer]
    route = experts.ids.defining_op
    return route if isinstance(route, RouteOp) else None, experts


def rewrite_weight(module: Module, op: WeightOp, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts a changed copy of a weight into the store and makes `op` name it."""
    assert module.weights.store is not None
    stored = module.weights.store.put(change(module.weights.load(op.source)))
    op.source = str(stored)


def stacks_of(experts: ExpertsOp) -> list[WeightOp]:
    found = [value.defining_op for value in experts.weights]
    assert all(isinstance(op, WeightOp) for op in found)
    return found  # type: ignore[return-value]


def router_of(route: RouteOp) -> WeightOp:
    linear = route.logits.defining_op
    assert linear is not None
    weight = linear.operands[1].defining_op
    assert isinstance(weight, WeightOp)
    return weight


def unused_experts(module: Module, layer: int) -> list[int]:
    """Router outputs of a layer that no token of `IDS` chooses."""
    chosen: list[set[int]] = []

    def observe(seen: Observation) -> None:
        if isinstance(seen.op, ExpertsOp):
            chosen.append(set(seen.operand(seen.op.ids).flatten().tolist()))

    Executor(module.op, module.weights).run(inputs_of(module, IDS, torch.ones_like(IDS)), observers=[observe])
    return [expert for expert in range(8) if expert not in chosen[layer]]


def test_nothing_changed(raised: Module) -> None:
    assert measured(raised, copy_of(raised)) == []
    everything = measured(raised, copy_of(raised), Check.FULL)
    names = ["before the layers", *(f"model.layers.{i}" for i in range(LAYERS)), "after the layers"]
    assert [change.layer for change in everything] == names
    assert all(change.error == 0 for change in everything)
    assert measured(raised, raised, Check.NONE) == []


def test_protecting_experts_changes_no_layer(raised: Module) -> None:
    after = copy_of(raised)
    expert_layer(after, 1)[1].protected = (0, 3)
    assert measured(raised, after) == []


@pytest.mark.parametrize("scale", [1.001, 1 + 1e-7])
def test_scaled_expert_that_nobody_chooses_is_caught(raised: Module, scale: float) -> None:
    """The natural tokens see nothing, the tokens that are sent to every expert do, in the right place only."""
    after = copy_of(raised)
    expert = unused_experts(raised, 2)[-1]

    def scaled(stack: torch.Tensor) -> torch.Tensor:
        stack[expert] *= scale
        return stack

    rewrite_weight(after, stacks_of(expert_layer(after, 2)[1])[1], scaled)
    (change,) = measured(raised, after)
    assert change.layer == "model.layers.2"
    assert change.relative_error == 0
    assert change.experts_reached == change.experts == 8
    assert change.worst_expert == expert
    assert 0.001 * (scale - 1) < change.expert_error < 10 * (scale - 1)
    assert change.error > EXACT


def test_scaled_expert_is_caught_before_the_router_is_raised(traced: Module) -> None:
    after = copy_of(traced)
    expert = unused_experts(traced, 1)[0]

    def scaled(stack: torch.Tensor) -> torch.Tensor:
        stack[expert] *= 1.001
        return stack

    rewrite_weight(after, stacks_of(expert_layer(after, 1)[1])[1], scaled)
    (change,) = measured(traced, after)
    assert (change.relative_error, change.worst_expert) == (0, expert)
    assert change.expert_error == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("both_unused", [False, True])
def test_swapped_router_rows_are_caught(raised: Module, both_unused: bool) -> None:
    after = copy_of(raised)
    route, _ = expert_layer(after, 0)
    assert route is not None
    unused = unused_experts(raised, 0)
    other = unused[1] if both_unused else next(expert for expert in range(8) if expert not in unused)

    def swapped(router: torch.Tensor) -> torch.Tensor:
        router[[unused[0], other]] = router[[other, unused[0]]]
        return router

    rewrite_weight(after, router_of(route), swapped)
    (change,) = measured(raised, after)
    assert change.layer == "model.layers.0" and change.expert_error > 1e-3
    assert (change.relative_error > 1e-3) is not both_unused


def test_permuted_experts_are_exact(raised: Module) -> None:
    after = copy_of(raised)
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    route, experts = expert_layer(after, 1)
    assert route is not None
    for op in (router_of(route), *stacks_of(experts)):
        rewrite_weight(after, op, lambda tensor: tensor[order].contiguous())
    (change,) = measured(raised, after)
    assert change.error < EXACT and change.router_differences == 0
    assert change.experts_reached == 8


def test_permuted_experts_without_their_router_rows_are_caught(raised: Module) -> None:
    """Two experts that no natural token chooses change places."""
    after = copy_of(raised)
    first, second = unused_experts(raised, 1)[:2]

    def swapped(stack: torch.Tensor) -> torch.Tensor:
        stack[[first, second]] = stack[[second, first]]
        return stack

    for op in stacks_of(expert_layer(after, 1)[1]):
        rewrite_weight(after, op, swapped)
    (change,) = measured(raised, after)
    assert change.relative_error == 0
    assert change.expert_error > 1e-3 and change.worst_expert in (first, second)


def test_scale_folded_into_experts_is_exact(raised: Module) -> None:
    after = copy_of(raised)
    route, experts = expert_layer(after, 1)
    assert route is not None
    route.routing = replace(route.routing, scale=2.0)
    rewrite_weight(after, stacks_of(experts)[1], lambda stack: stack / 2)
    (change,) = measured(raised, after)
    assert change.error < EXACT
    route.routing = replace(route.routing, scale=1.0)
    (change,) = measured(raised, after)
    assert change.relative_error > 1e-3


def test_dropped_renormalisation_is_caught(raised: Module) -> None:
    after = copy_of(raised)
    route, _ = expert_layer(after, 3)
    assert route is not None and route.routing.weight_from is WeightFrom.SOFTMAX_SELECTED
    route.routing = replace(route.routing, weight_from=WeightFrom.SCORE)
    (change,) = measured(raised, after)
    assert change.layer == "model.layers.3" and change.error > 1e-3 and change.router_differences == 0


def test_errors_stay_in_the_layer_that_causes_them(raised: Module) -> None:
    after = copy_of(raised)
    rewrite_weight(after, stacks_of(expert_layer(after, 0)[1])[0], lambda stack: stack * 1.5)
    changes = {change.layer: change for change in measured(raised, after, Check.FULL)}
    assert changes["model.layers.0"].relative_error > 1e-2
    assert all(change.error == 0 for name, change in changes.items() if name != "model.layers.0")


def test_one_layer_stands_for_those_that_changed_alike(traced: Module) -> None:
    before, after = copy_of(traced), copy_of(traced)
    run_passes(before, "canonicalize,cse,dce")
    run_passes(after, "canonicalize,cse,dce,raise-nn")
    changes = {change.layer: change for change in measured(before, after)}
    assert [changes[f"model.layers.{i}"].same_as for i in range(1, LAYERS)] == ["", "model.layers.1", "model.layers.1"]
    assert all(change.error < EXACT for change in changes.values())


def test_same_new_weight_in_two_layers_is_measured_in_both(raised: Module) -> None:
    """A copy of layer 1's weight is right in layer 1 and wrong in layer 2."""
    after = copy_of(raised)
    first, second = (stacks_of(expert_layer(after, layer)[1])[1] for layer in (1, 2))
    rewrite_weight(after, first, lambda stack: stack)
    second.source = first.source
    right, wrong = measured(raised, after)
    assert (right.layer, right.error, right.same_as) == ("model.layers.1", 0, "")
    assert wrong.layer == "model.layers.2" and wrong.error > 1e-2 and wrong.same_as == ""


@pytest.mark.parametrize("passes", ["raise-moe", "raise-moe,canonicalize,cse,dce,add-kv-cache"])
def test_passes_that_change_inputs_and_routers(traced: Module, passes: str) -> None:
    before, after = copy_of(traced), copy_of(traced)
    run_passes(before, "canonicalize,cse,dce,raise-nn")
    run_passes(after, f"canonicalize,cse,dce,raise-nn,{passes}")
    changes = measured(before, after, ids=random_tokens(2, 9))
    assert changes and all(change.error < EXACT for change in changes)
    assert changes[-2].same_as or changes[-1].same_as, "layers with caches of their own still changed alike"


@pytest.mark.parametrize("exact", [False, True])
def test_layers_between_are_computed_only_where_errors_are_wanted(raised: Module, exact: bool) -> None:
    after = copy_of(raised)
    rewrite_weight(after, stacks_of(expert_layer(after, 3)[1])[0], lambda stack: stack * 1.5)
    context = LoadingContext(raised.weights)
    before, changed = replace(raised, weights=context), replace(after, weights=context)
    inputs = (inputs_of(raised, IDS, torch.ones_like(IDS)),) * 2
    (change,) = measure_change(before, changed, inputs, exact=exact)
    assert change.layer == "model.layers.3" and change.error > 1e-2
    assert any("model.layers.3." in source for source in context.loaded)
    assert any("model.layers.2." in source for source in context.loaded) is not exact


class LoadingContext(WeightContext):
    """Notes what is loaded."""

    def __init__(self, other: WeightContext) -> None:
        super().__init__(other.checkpoint, other.store)
        self.loaded: set[str] = set()

    def load(self, expression: Expression | str, index: int | slice | None = None) -> torch.Tensor:
        self.loaded.add(str(expression))
        return super().load(expression, index)


def test_padding_is_not_compared(raised: Module) -> None:
    """What stands at padding is nobody's business: a pass may fill it differently."""
    ids = random_tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    other = ids.clone()
    other[1, :3] = 5
    inputs = (inputs_of(raised, ids, mask), inputs_of(raised, other, mask))
    changes = measure_change(raised, copy_of(raised), inputs, check=Check.FULL)
    assert all(change.error < EXACT for change in changes)


def test_ties_are_no_errors() -> None:
    routing = Routing(k=2, normalize=Normalize.SUM)
    logits = torch.randn(6, 8, dtype=torch.float64)
    ranked = logits.argsort(1, descending=True)
    logits[0, ranked[0, 2]] = logits[0, ranked[0, 1]] * (1 + 1e-16)
    margins = routing_margin(RouteInputs(logits), routing)
    assert margins[0] <= tie_tolerance(torch.float64) < margins[1:].min()


@pytest.mark.parametrize("gap", [1e-15, 1e-3])
def test_tie_or_difference(raised: Module, gap: float) -> None:
    """Two router rows that differ by `gap` and change places: a tie if rounding could decide, else a difference."""
    from moec.reference.agreement import RouteRecord, record_route

    before, after = copy_of(raised), copy_of(raised)
    ids = random_tokens(2, 12)
    mask = torch.ones_like(ids)
    found: list[list[RouteRecord]] = []
    for module, sign in ((before, 1), (after, -1)):
        route, _ = expert_layer(module, 0)
        assert route is not None
        router = module.weights.load(router_of(route).source).double()
        router[1:] = (
            router[0] * (1 + sign * gap * torch.arange(1, 8, dtype=torch.float64))[:, None]
            if gap < 1e-9
            else router[1:]
        )
        if gap > 1e-9:
            router = router if sign > 0 else router[torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])]
        records: list[RouteRecord] = []

        def observe(seen: Observation, records: list[RouteRecord] = records) -> None:
            if isinstance(seen.op, RouteOp) and not records:
                records.append(record_route(seen))

        Executor(module.op, module.weights, dtype=torch.float64).run(
            inputs_of(module, ids, mask), observers=[observe], overrides={router_of(route).weight_name: router}
        )
        found.append(records)
    (old,), (new,) = found
    identity = torch.arange(8)
    agreement = compare_routes(old, new, identity, tie_tolerance(torch.float64))
    assert not bool(agreement.same.all())
    if gap < 1e-9:
        assert agreement.differences == 0 and bool(agreement.ties.any())
    else:
        assert agreement.differences > 0
        assert relabelling(old, new).tolist() == [1, 0, 2, 3, 4, 5, 6, 7]
        moved = compare_routes(old, new, relabelling(old, new), tie_tolerance(torch.float64))
        assert bool(moved.same.all())


def test_layers_that_lost_their_names_are_compared_as_a_whole(raised: Module) -> None:
    after = copy_of(raised)
    for op in after.main.walk():
        op.location = Location()
    assert measured(raised, after) == []
    rewrite_weight(after, stacks_of(expert_layer(after, 0)[1])[0], lambda stack: stack * 1.5)
    (change,) = measured(raised, after)
    assert change.layer == "the whole model" and change.error > 1e-2
