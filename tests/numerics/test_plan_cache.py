"""Caches of experts: policies on traces that can be followed by hand, and predictors that must or cannot be right."""

from __future__ import annotations

import numpy as np
import torch

from moec.passes.cache_planning.prediction import path_recall
from moec.passes.cache_planning.simulation import Access, Policy, hit_rate


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
