"""Two precisions of an expert, on the demo model."""

from __future__ import annotations

import pytest
import torch

import moec
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
