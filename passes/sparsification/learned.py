"""Masks n:m that are learned: each block of a row chooses among all patterns by gradients (MaskLLM, in small).

The weights stay as they are. Choices are softmaxes over patterns with Gumbel noise, sharper from step to step, of
logits that begin near a mask that is known already, the prior. What is learned from is the error of the expert's
output on its calibration rows; MaskLLM learns from the loss of the language model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moec.experts import Dense, FeedForward
from moec.passes.sparsification.inputs import Matrix
from moec.passes.sparsification.masks import BlockPattern

_RATE = 2e-3
_DEVIATION = 0.01
"""Standard deviation of the logits at the start, and the unit of the prior's strength."""

_SCALE = (100.0, 500.0)
_TEMPERATURE = (4.0, 0.05)
_ROWS = 256
"""Rows of a step."""


@dataclass(frozen=True)
class LearnedMasks:
    """bool [out, in] for each matrix; `before` and `after`: squared error of the expert with the prior and with these
    masks on rows that were not learned from, as shares of its squared output. Masks that are no better are the prior.
    """

    masks: Mapping[Matrix, torch.Tensor]
    before: float
    after: float


def patterns_of(pattern: BlockPattern) -> torch.Tensor:
    """All ways to keep n of m, float32 [ways, m]."""
    chosen = list(itertools.combinations(range(pattern.block), pattern.kept))
    return torch.zeros(len(chosen), pattern.block).scatter_(1, torch.tensor(chosen), 1.0)


def learn_masks(
    expert: FeedForward,
    prior: Mapping[Matrix, torch.Tensor],
    pattern: BlockPattern,
    rows: torch.Tensor,
    gates: torch.Tensor,
    held: torch.Tensor,
    *,
    steps: int,
    strength: float,
    generator: torch.Generator,
) -> LearnedMasks:
    """Learns masks for an expert with dense matrices from `rows` [n, H] with `gates` [n], without those `held` (bool).

    `prior` are masks bool [out, in]; with a high `strength` they come out as they went in.
    """
    wanted, weights = expert.apply(rows), gates.float()[:, None]
    scale = float((weights * wanted)[held].square().sum()) or 1.0

    def held_out_error(masks: Mapping[Matrix, torch.Tensor]) -> float:
        errors = masked(expert, masks).apply(rows[held]) - wanted[held]
        return float((weights[held] * errors).square().sum()) / scale

    before = held_out_error(prior)
    seen = (~held).nonzero()[:, 0]
    if before == 0.0 or not len(seen):
        return LearnedMasks(prior, before, before)
    ways = patterns_of(pattern)
    logits = {matrix: _start(mask, ways, strength, generator) for matrix, mask in prior.items()}
    optimizer = torch.optim.Adam(list(logits.values()), lr=_RATE)
    energy = (weights * wanted)[seen].square().mean()
    with torch.enable_grad():
        for step in range(steps):
            part = seen[torch.randint(len(seen), (min(_ROWS, len(seen)),), generator=generator)]
            soft = {matrix: _soft(value, ways, step / steps, generator) for matrix, value in logits.items()}
            errors = weights[part] * (masked(expert, soft).apply(rows[part]) - wanted[part])
            optimizer.zero_grad()
            (errors.square().mean() / energy).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found = {matrix: ways[value.detach().argmax(-1)].flatten(1).bool() for matrix, value in logits.items()}
    after = held_out_error(found)
    return LearnedMasks(found, before, after) if after < before else LearnedMasks(prior, before, before)


def masked(expert: FeedForward, masks: Mapping[Matrix, torch.Tensor]) -> FeedForward:
    """The expert with its dense matrices times `masks`, bool or float32 [out, in]."""
    found = {Matrix.GATE: expert.gate, Matrix.UP: expert.up, Matrix.DOWN: expert.down}
    changed = {
        matrix: replace(projection, matrix=Dense(projection.dense() * masks[matrix]))
        for matrix, projection in found.items()
        if projection is not None
    }
    return replace(expert, gate=changed.get(Matrix.GATE), up=changed[Matrix.UP], down=changed[Matrix.DOWN])


def _start(prior: torch.Tensor, ways: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Logits [out, blocks, ways], higher for patterns that share more with the prior."""
    blocks = prior.reshape(len(prior), -1, ways.shape[1]).float()
    shared = blocks @ ways.T
    noise = torch.randn(shared.shape, generator=generator)
    near = shared - shared.mean(-1, keepdim=True)
    return (_DEVIATION * (noise + strength * near)).requires_grad_()


def _soft(logits: torch.Tensor, ways: torch.Tensor, progress: float, generator: torch.Generator) -> torch.Tensor:
    """A mask [out, in] between 0 and 1."""
    scale = _SCALE[0] + (_SCALE[1] - _SCALE[0]) * progress
    temperature = _TEMPERATURE[0] + (_TEMPERATURE[1] - _TEMPERATURE[0]) * progress
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    gumbel = -torch.log(exponential.clamp_min(1e-20))
    chosen = torch.softmax((logits * scale + gumbel) / temperature, dim=-1)
    return (chosen @ ways).flatten(1)
