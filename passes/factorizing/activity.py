"""What neurons do on calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch

from moec.calibration.calibration import Calibration
from moec.calibration.sample import LayerSample
from moec.experts import Dense, FeedForward, MoeLayer, Projection

CHUNK_ROWS = 1024


class Activity(Enum):
    """How active a neuron is on a token."""

    CONTRIBUTION = "contribution"  # |phi_i| ||D_i||, the length of what it adds to the output
    NORMALIZED = "normalized"  # |phi_i| where the token and the rows of gate and up have length 1 (CMoE)


@dataclass(frozen=True, eq=False)
class Observed:
    """Text in front of a block: rows `x` [n, H], the derivative `gradient` [n, H] of the text's loss by the block's
    output (None where it was not calibrated), and of which `sequence` and `domain` int64 [n] each row is."""

    x: torch.Tensor
    gradient: torch.Tensor | None
    sequence: torch.Tensor
    domain: torch.Tensor

    @staticmethod
    def of(calibration: Calibration, sample: LayerSample) -> Observed:
        """All rows of a sample."""
        return Observed(sample.x, sample.gradient, sample.sequence, calibration.domains(sample))

    @staticmethod
    def of_expert(calibration: Calibration, layer: MoeLayer, expert: int) -> Observed:
        """The rows of a layer's sample that chose a stored expert."""
        sample = calibration.sample(layer)
        rows, gates = sample.chosen(layer, expert)
        mine = sample.subset(rows)
        gradient = None if mine.gradient is None else mine.gradient * gates[:, None].to(mine.gradient.dtype)
        return Observed(mine.x, gradient, mine.sequence, calibration.domains(mine))

    def __len__(self) -> int:
        """n."""
        return len(self.x)


def activities(block: FeedForward, observed: Observed, activity: Activity) -> Iterator[torch.Tensor]:
    """How active the neurons are, float32 [at most `CHUNK_ROWS`, m], some rows at a time."""
    scale: torch.Tensor | float = 1.0
    if activity is Activity.NORMALIZED:
        gate = None if block.gate is None else _unit_rows(block.gate)
        block = replace(block, gate=gate, up=_unit_rows(block.up))
    else:
        scale = block.down.dense().norm(dim=0)
    for rows in torch.split(observed.x.float(), CHUNK_ROWS):
        if activity is Activity.NORMALIZED:
            rows = torch.nn.functional.normalize(rows, dim=1)
        yield block.hidden_activations(rows).abs() * scale


def markers(block: FeedForward, observed: Observed, active: int, activity: Activity) -> torch.Tensor:
    """bool [n, m]: whether a neuron is among the `active` most active ones of a row; one that does nothing is not."""
    found = []
    for strength in activities(block, observed, activity):
        marked = torch.zeros_like(strength, dtype=torch.bool)
        marked.scatter_(1, strength.topk(active, dim=1).indices, True)
        found.append(marked & (strength > 0))
    return torch.cat(found)


def _unit_rows(projection: Projection) -> Projection:
    return Projection(Dense(torch.nn.functional.normalize(projection.dense(), dim=1)))
