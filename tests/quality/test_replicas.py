"""Two precisions of an expert, and losses of single experts and of pairs, on the demo model."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch

import moec
from moec.experts import find_moe_layers
from moec.passes.bit_allocation.measured import MeasuredPlans
from moec.passes.bit_allocation.orders import Sensitivities
from moec.passes.quantizing.choices import FormatOptions
from moec.reference import replica
from tests.quality.harness import calibrated, compress, measure

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-replicas")]

NAME = "tiny-moe"


def test_low_gates_read_low_replicas_at_least_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOBBIT: by rank, at random, the most important first, each for as many slots."""
    module = calibrated(NAME)
    moec.run_passes(module, "make-replicas{bits=2 group=32 method=rtn high=0.5}")
    ranks = replica.gates_before
    generator = torch.Generator().manual_seed(0)

    def shuffled(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before, total = ranks(gates)
        return before.flatten()[torch.randperm(before.numel(), generator=generator)].reshape(before.shape), total

    def reversed_ranks(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before, total = ranks(gates)
        return total - before, total

    found = [measure(NAME, module).increase]
    for other in (shuffled, reversed_ranks):
        monkeypatch.setattr(replica, "gates_before", other)
        found.append(measure(NAME, module).increase)
    monkeypatch.undo()
    every = compress(NAME, "quantize{bits=2 group=32}").increase
    print(f"by rank {found[0]:+.4f}, at random {found[1]:+.4f}, reverse {found[2]:+.4f}, all {every:+.4f}")
    assert found[0] < 0.5 * found[1] and found[1] < 0.9 * found[2] and found[2] < every


def test_higher_thresholds_cost_less() -> None:
    options = "make-replicas{{bits=2 group=32 high={}}}"
    found = [compress(NAME, options.format(high)).increase for high in (0.5, 0.7, 1.0)]
    assert found[0] > found[1] > found[2] - 1e-4 and abs(found[2]) < 1e-6


def test_pairs_foresee_the_loss_of_a_set_better_than_singles() -> None:
    """Second-order sensitivities, over two sets of experts from all layers, in 1 bit instead of 4: with 2 bits all
    errors are as small as what higher orders add."""
    module = calibrated(NAME)
    assert module.calibration is not None
    data = dataclasses.replace(module.calibration.data, sequences=module.calibration.data.sequences[:8])
    units = [(layer.index, number) for layer in find_moe_layers(module.op) for number in range(layer.expert_count)]
    targets = [FormatOptions(bits=bits, group="32").target() for bits in (1, 4)]
    plans = MeasuredPlans(module, data, units, targets)

    def rise(*low: int) -> float:
        return plans.loss({unit: int(place not in low) for place, unit in enumerate(units)}) - source

    source = plans.loss(dict.fromkeys(units, 1))
    without = within = 0.0
    for start in (0, 2):
        chosen = range(start, len(units), 4)
        singles = [rise(place) for place in chosen]
        pairs = {
            (i, j): rise(chosen[i], chosen[j]) - singles[i] - singles[j] for i, j in combinations(range(len(chosen)), 2)
        }
        joint = rise(*chosen)
        augmented = Sensitivities(singles, pairs).of(range(len(chosen)))
        print(f"singles {sum(singles):.4f}, with pairs {augmented:.4f}, measured {joint:.4f}")
        without += abs(sum(singles) - joint)
        within += abs(augmented - joint)
    assert within < without
