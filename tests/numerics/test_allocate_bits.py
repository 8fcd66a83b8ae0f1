"""`allocate-bits`: solvers against all choices, budgets, bands of neurons, and what `quantize{planned}` makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from moec.api import run_passes
from moec.artifact.summary import model_size
from moec.calibration.text_loss import text_loss
from moec.errors import UsageError
from moec.experts import (
    Banded,
    Dense,
    FeedForward,
    Quantized,
    find_moe_layers,
    load_expert,
    permute_experts,
    protect_experts,
)
from moec.ir import parse_module, print_operation
from moec.module import Module
from moec.passes.bit_allocation.bands import bands_by_energy
from moec.passes.bit_allocation.costs import LayerCosts, Objective
from moec.passes.bit_allocation.orders import Sensitivities, longest_prefix
from moec.passes.bit_allocation.solvers import Solver, Table, solve
from moec.passes.factoring.sides import Side, dense_matrix, with_matrices
from moec.passes.quantizing.choices import FormatOptions
from moec.quantization.bit_plan import BitPlan, ExpertBits
from moec.quantization.rounding import round_matrix
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model


def random_table(seed: int, units: int, choices: int, least: dict[int, int]) -> Table:
    generator = np.random.default_rng(seed)
    costs = np.sort(generator.random((units, choices)))[:, ::-1].copy()
    sizes = np.arange(1, choices + 1)[None] * generator.integers(1, 4, (units, 1))
    budget = int(sizes.min(1).sum() + generator.integers(0, sizes.max(1).sum() - sizes.min(1).sum() + 1))
    return Table(costs, sizes, budget, least)


@pytest.mark.parametrize("seed", range(40))
def test_dynamic_programming_is_as_good_as_trying_everything(seed: int) -> None:
    units, choices = 1 + seed % 5, 2 + seed % 2
    table = random_table(seed, units, choices, {0: seed % 2, choices - 1: seed % 3 // 2})
    allowed = [found for found in product(range(choices), repeat=units) if table.allows(found)]
    best = min((table.cost(found) for found in allowed), default=None)
    found = solve(table, Solver.DP)
    if best is None:
        assert found is None
    else:
        assert found is not None and table.allows(found) and table.cost(found) == pytest.approx(best)
    greedy = solve(Table(table.costs, table.sizes, table.budget), Solver.GREEDY)
    assert greedy is not None and int(table.sizes[np.arange(units), list(greedy)].sum()) <= table.budget


def test_large_sizes_keep_to_the_budget() -> None:
    """Sizes without a common measure are rounded up to units."""
    table = random_table(3, 12, 3, {})
    large = Table(table.costs, table.sizes * 9_999_991 + 1, table.budget * 9_999_991 + 12)
    found = solve(large, Solver.DP)
    assert found is not None and large.allows(found)


def test_bands_hold_the_neurons_of_greatest_energy() -> None:
    energies = [torch.tensor([8.0, 1, 7, 2, 6, 3, 5, 4]), torch.arange(8.0) / 10]
    found = bands_by_energy(energies, (8, 4, 2), (0.25, 0.25, 0.5), 1)
    assert [[(band.bits, band.neurons) for band in item.bands] for item in found] == [
        [(8, (0, 2, 4, 6)), (4, (7, 5, 3, 1))],
        [(2, (7, 6, 5, 4, 3, 2, 1, 0))],
    ]
    rounded = bands_by_energy(energies, (8, 4, 2), (0.125, 0.125, 0.75), 4)
    assert [[(band.bits, len(band.neurons)) for band in item.bands] for item in rounded] == [
        [(8, 4), (2, 4)],
        [(2, 8)],
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("model")
    module = raised_model("mixtral", folder)
    run_passes(module, calibrate_text(folder))
    return module


def planned(source: Module, options: str) -> tuple[Module, BitPlan]:
    module = copy_of(source)
    run_passes(module, f"allocate-bits{{{options}}}")
    assert module.bits is not None
    return module, module.bits


@pytest.mark.parametrize("average", [2.0, 3.0])
def test_costs_of_the_codes_that_are_made(source: Module, average: float) -> None:
    """The cost of a plan is the error of the layers that `quantize{planned method=gptq}` makes of it; and by these
    costs other experts get fewer bits than by those of nearest codes, for less error."""
    errors = {}
    for method in ("rtn", "gptq"):
        module, plan = planned(source, f"average={average} bits=1,2,4 method={method} group=16")
        run_passes(module, "quantize{planned method=gptq group=16}")
        assert source.calibration is not None
        total = 0.0
        for old, new in zip(find_moe_layers(source.op), find_moe_layers(module.op), strict=True):
            sample = source.calibration.sample(old)
            whole = float(sample.y.double().square().sum())
            for number in range(old.expert_count):
                rows, gates = sample.chosen(old, number)
                x = sample.x[rows].float()
                one, other = load_expert(old, source.weights, number), load_expert(new, module.weights, number)
                total += float(((other.apply(x) - one.apply(x)).double() * gates[:, None]).square().sum()) / whole
        errors[method] = total
        assert (plan.cost == pytest.approx(total, rel=1e-4)) == (method == "gptq")
    assert errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("by_side", [False, True])
def test_costs_are_those_of_the_formulas(source: Module, by_side: bool) -> None:
    """With d F what rounding changes: g^2 |d F|^2; that times shares of tokens and gates; shares, and energies, times
    relative errors of weights."""
    assert source.calibration is not None
    layer = find_moe_layers(source.op)[0]
    sample = source.calibration.sample(layer)
    number = 3
    expert = load_expert(layer, source.weights, number)
    assert isinstance(expert, FeedForward)
    rows, gates = sample.chosen(layer, number)
    x, whole = sample.x[rows].float(), float(sample.y.double().square().sum())
    tokens, gate_share = len(rows) / len(sample), float(gates.sum() / sample.route(layer).gates.double().sum())
    energy = float((expert.apply(x).double() * gates[:, None]).square().sum()) / whole
    targets = [FormatOptions(bits=bits, group="16").target() for bits in (2, 4)]
    found = {
        objective: LayerCosts(layer, sample, objective).of(number, expert, targets, by_side=by_side)
        for objective in Objective
        if not objective.is_measured
    }
    for place, sides in enumerate([[side] for side in Side] if by_side else [list(Side)]):
        for choice, target in enumerate(targets):
            old = {side: dense_matrix(expert, side) for side in sides}
            new = {side: round_matrix(target, weight).dense() for side, weight in old.items()}
            changed = with_matrices(expert, {side: Dense(weight) for side, weight in new.items()})
            moved = (changed.apply(x) - expert.apply(x)).double() * gates[:, None]
            error = float(moved.square().sum()) / whole
            wrong = sum(float((new[side] - old[side]).double().square().sum()) for side in sides)
            relative = wrong / sum(float(weight.double().square().sum()) for weight in old.values())
            wanted = {
                Objective.OUTPUT: error,
                Objective.PMQ: tokens * gate_share**1.5 * error,
                Objective.FREQUENCY: tokens * relative,
                Objective.ENERGY: energy * relative,
            }
            for objective, costs in found.items():
                assert costs[place][choice] == pytest.approx(wanted[objective], rel=1e-5), objective


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("unit", ["expert", "projection"])
def test_plans_keep_to_their_average(source: Module, unit: str, scope: str) -> None:
    """Sizes are equal here, so that the average is met exactly, and the cost falls with it."""
    costs = []
    for average in (2.0, 2.5, 3.0):
        options = f"unit={unit} scope={scope} average={average} bits=2,3,4 group=16"
        module, plan = planned(source, options)
        assert plan.average == pytest.approx(average)
        costs.append(plan.cost)
        before = print_operation(module.op)
        assert before == print_operation(source.op)
    assert costs == sorted(costs, reverse=True)


def test_planned_bits_are_those_of_the_matrices(source: Module) -> None:
    module, plan = planned(source, "unit=projection average=2.5 bits=1,2,4 group=16 at-least=1:2")
    run_passes(module, "quantize{planned group=16}")
    seen = 0
    for layer in find_moe_layers(module.op):
        bits = plan.layers[layer.name]
        flat = []
        for number, wanted in enumerate(bits):
            expert = load_expert(layer, module.weights, number)
            assert wanted is not None and isinstance(expert, FeedForward) and expert.gate is not None
            for item, count in ((expert.gate, wanted.gate), (expert.up, wanted.up), (expert.down, wanted.down)):
                assert isinstance(item.matrix, Quantized)
                assert item.matrix.packed.format.bits == count  # type: ignore[attr-defined]
                flat.append(count)
        assert flat.count(1) >= 2
        seen += len(flat)
        assert len(layer.experts.classes) == len({(item.gate, item.up, item.down) for item in bits if item})
    assert seen == 3 * sum(layer.expert_count for layer in find_moe_layers(source.op))


def test_bands_are_packed_alone_and_read_back(source: Module) -> None:
    module, plan = planned(source, "unit=micro bits=8,4,2 shares=0.25,0.25,0.5 group=16")
    assert plan.average == pytest.approx(4.0, abs=0.5)
    wanted = copy_of(source)
    run_passes(module, "quantize{planned group=16}")
    assert difference(output(wanted), output(module)) < 1
    text = print_operation(module.op)
    assert print_operation(parse_module(text)) == text
    layer = find_moe_layers(module.op)[0]
    for number in range(layer.expert_count):
        expert = load_expert(layer, module.weights, number)
        assert isinstance(expert, FeedForward) and isinstance(expert.down.matrix, Banded)
        bits = plan.layers[layer.name][number]
        assert bits is not None and expert.down.matrix.axis == 1
        assert [part.shape[1] for part in expert.down.matrix.parts] == [len(band.neurons) for band in bits.bands]
        assert [part.packed.format.bits for part in expert.down.matrix.parts] == [band.bits for band in bits.bands]  # type: ignore[attr-defined]
    before = output(module)
    permute_experts(layer, [7, 6, 5, 4, 3, 2, 1, 0])
    assert difference(before, output(module)) < 1e-12


def test_eight_bit_bands_change_next_to_nothing(source: Module) -> None:
    """Neurons only change places; size, sums and bytes are those of eight bits for all."""
    banded, plan = planned(source, "unit=micro bits=8,7 shares=1,0 group=16")
    run_passes(banded, "quantize{planned group=16}")
    plain = copy_of(source)
    run_passes(plain, "quantize{bits=8 group=16}")
    assert plan.average == 8 and model_size(banded).parameters == model_size(plain).parameters
    first = [find_moe_layers(module.op)[0] for module in (source, banded)]
    x = torch.randn(32, first[0].hidden_size, generator=torch.Generator().manual_seed(0))
    for number in range(first[0].expert_count):
        one, other = (load_expert(layer, source.weights, number) for layer in first)
        assert float((one.apply(x) - other.apply(x)).norm() / one.apply(x).norm()) < 0.02


def test_protected_experts_have_no_bits(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    protect_experts(layer, [2])
    run_passes(module, "allocate-bits{average=3 group=16},quantize{planned group=16}")
    assert module.bits is not None
    assert [number for number, bits in enumerate(module.bits.layers[layer.name]) if bits is None] == [2]
    kept = load_expert(find_moe_layers(module.op)[0], module.weights, 2)
    assert isinstance(kept, FeedForward) and not isinstance(kept.up.matrix, Quantized)


def test_what_cannot_be_planned(source: Module) -> None:
    module = copy_of(source)
    with pytest.raises(UsageError, match="no plan of bits"):
        run_passes(module, "quantize{planned group=16}")
    with pytest.raises(UsageError, match="no choice of bits keeps to"):
        run_passes(module, "allocate-bits{average=2 bits=2,4 group=16 at-least=4:1}")
    with pytest.raises(UsageError, match="groups of 40 do not divide"):
        run_passes(module, "allocate-bits{unit=micro bits=8,4,2 group=40}")
    run_passes(module, "allocate-bits{average=3 group=16},prune-experts{criterion=frequency keep=4}")
    with pytest.raises(UsageError, match="does not fit this layer"):
        run_passes(module, "quantize{planned group=16}")


def test_orders_count_what_two_cost_more() -> None:
    plain = Sensitivities([3.0, 1.0, 2.0, 1.0])
    assert plain.order() == [1, 3, 2, 0] and plain.of([3, 0]) == 4.0
    # 1 and 3 together cost more than 2 does beside 1
    linked = Sensitivities([3.0, 1.0, 2.0, 1.0], {(1, 3): 5.0, (0, 2): -2.5})
    assert linked.order() == [1, 2, 0, 3] and linked.of([3, 1, 0]) == 10.0
    generator = np.random.default_rng(0)
    for _ in range(20):
        singles = generator.normal(size=6).tolist()
        pairs = {(i, j): float(generator.normal()) for i in range(6) for j in range(i + 1, 6)}
        found = Sensitivities(singles, pairs)
        order = found.order()
        for count in range(6):
            least = min(found.of([*order[:count], unit]) for unit in order[count:])
            assert found.of(order[: count + 1]) == pytest.approx(least)


def test_halving_finds_the_last_prefix_within_the_bound() -> None:
    for length in range(7):
        for last in range(length + 1):
            seen: list[int] = []

            def loss(count: int, last: int = last, seen: list[int] = seen) -> float:
                seen.append(count)
                return float(count > last)

            assert longest_prefix(length, loss, 0.5) == last
            assert len(seen) <= 3


def test_measured_plans_are_those_that_quantize_makes(source: Module) -> None:
    module, plan = planned(source, "objective=single-drop bits=2,4 average=3 group=16 sequences=4")
    assert plan.average == pytest.approx(3.0) and print_operation(module.op) == print_operation(source.op)
    assert source.calibration is not None
    data = replace(source.calibration.data, sequences=source.calibration.data.sequences[:4])
    rise = []
    for bits in (plan, BitPlan({name: (ExpertBits.uniform(4),) * 8 for name in plan.layers}, 4, 0)):
        packed = copy_of(source)
        packed.bits = bits
        run_passes(packed, "quantize{planned group=16}")
        rise.append(text_loss(packed, data))
    assert rise[0] - rise[1] == pytest.approx(plan.cost, abs=1e-5)


@pytest.mark.parametrize("objective", ["single-drop bits=2,4", "pairwise bits=2,4", "output bits=2,3,4 scope=model"])
def test_a_bound_of_the_loss_holds_and_the_next_step_breaks_it(source: Module, objective: str) -> None:
    module = copy_of(source)
    report = run_passes(module, f"allocate-bits{{objective={objective} max-loss=0.01 group=16 sequences=2}}")
    assert module.bits is not None and module.bits.cost <= 0.01
    text = next(remark.text for remark in report.records[0].remarks if "steps down" in remark.text)
    count, after = re.fullmatch(r"loss .* with (\d+) of 16 steps down(?:, (.*) with the next one)?", text).groups()  # type: ignore[union-attr]
    if after is None:
        assert module.bits.average == 2
    else:
        assert float(after) > 0.01
        assert module.bits.average == pytest.approx(4 - int(count) / 8, abs=0.07)
    units = 16 * 15 // 2 - 64 if objective.startswith("pairwise") else 0
    assert report.records[0].statistics["measured"] <= units + (17 if "bits=2,4" in objective else 1) + 6
