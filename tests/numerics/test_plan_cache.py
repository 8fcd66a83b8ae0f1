"""Caches of experts: policies on traces that can be followed by hand, and predictors that must or cannot be right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moec.api import run_passes
from moec.experts import find_moe_layers
from moec.passes.cache_planning.prediction import path_recall
from moec.passes.cache_planning.simulation import Access, Policy, hit_rate, simulate
from tests.experts.models import calibrate_text, raised_model


def _of(experts: list[int]) -> list[Access]:
    return [Access(0, expert, important=True) for expert in experts]


def test_policies_on_a_trace_by_hand() -> None:
    trace = _of([0, 0, 0, 1, 2, 0, 1, 2])
    # lru, two places: 0 misses, hits twice, 1 misses, 2 drives 0 out, 0 drives 1 out, 1 drives 2 out, 2 drives 0 out
    assert hit_rate(trace, Policy.LRU, 2, 1) == 2 / 8
    # lfu keeps 0, which was used most: 1 and 2 drive each other out
    assert hit_rate(trace, Policy.LFU, 2, 1) == 3 / 8
    assert hit_rate(trace, Policy.HOBBIT, 2, 1) >= 3 / 8
    for policy in Policy:
        assert hit_rate(trace, policy, 3, 1) == 5 / 8
        assert hit_rate([], policy, 3, 1) == 0.0


def test_frequency_beats_recency_where_choices_are_skewed() -> None:
    """As the report of HOBBIT has it: margins over five seeds."""
    margins = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        shares = 1.0 / np.arange(1, 17) ** 1.2
        trace = _of(generator.choice(16, 4000, p=shares / shares.sum()).tolist())
        margins.append(hit_rate(trace, Policy.LFU, 6, 1) - hit_rate(trace, Policy.LRU, 6, 1))
    assert min(margins) > 0.02


def test_layers_share_one_cache() -> None:
    trace = [Access(layer, 0, important=True) for _ in range(10) for layer in range(3)]
    assert hit_rate(trace, Policy.LRU, 3, 3) == 27 / 30
    # with one place too few, the least recently used expert is always the one that comes next
    assert hit_rate(trace, Policy.LRU, 2, 3) == 0.0


def test_paths_foresee_what_follows_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(0, 8, (400, 1), generator=generator)
    assert path_recall((before + 3) % 8, before, 8, 8) == 1.0
    chance = path_recall(torch.randint(0, 8, (400, 1), generator=generator), before, 8, 8)
    assert chance < 0.3
    # empty slots do not count
    assert path_recall(torch.full((400, 1), -1), before, 8, 8) == 0.0


def test_the_pass_walks_through_the_rows_of_the_calibration(tmp_path: Path) -> None:
    """Row by row, layer by layer, by descending gates, of which those behind more than .6 of the gates count little."""
    module = raised_model("mixtral", tmp_path)
    run_passes(module, calibrate_text(tmp_path))
    assert module.calibration is not None
    layers = find_moe_layers(module.op)
    runs = [module.calibration.sample(layer).route(layer) for layer in layers]
    trace = []
    for row in range(100):
        for number, found in enumerate(runs):
            gates, ids = found.gates[row].tolist(), found.stored_ids[row].tolist()
            before = 0.0
            for gate, expert in sorted(zip(gates, ids, strict=True), reverse=True):
                trace.append(Access(number, expert, important=before <= 0.6 * sum(gates)))
                before += gate
    assert 0 < sum(access.important for access in trace) - len(trace) / 2 < len(trace) / 2
    size = round(0.3 * sum(layer.expert_count for layer in layers))
    rates = {policy: hit_rate(trace, policy, size, len(layers)) for policy in Policy}
    report = run_passes(module, "plan-cache{capacity=0.3 rows=100}")
    text = ", ".join(f"{policy.value} {rate:.1%}" for policy, rate in rates.items())
    assert text in report.records[0].remarks[0].text
    plan = module.cache_plan
    assert plan is not None and plan.capacity == size and rates[plan.policy] == max(rates.values())
    hits = simulate(trace, plan.policy, size, len(layers))
    for number, layer in enumerate(layers):
        expected = [hits.rate_of((number, expert)) for expert in range(layer.expert_count)]
        assert plan.hit_rates[layer.name] == tuple(expected)
