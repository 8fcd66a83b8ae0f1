"""Least-squares fit of the last products of a layer's experts to what the original layer made of the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from moec.calibration.sample import LayerSample
from moec.experts import Dense, Expert, FeedForward, LowRank, MoeLayer, Quantized, load_expert
from moec.passes.merging.least_squares import held_out_rows, mean_square, ridge_changes
from moec.weights.context import WeightContext

EXACT = 1e-10
"""A layer whose error is below this share of its output is as good as it was."""


class FitScope(Enum):
    """Whether all experts of a layer are fitted at once, or one after the other, or what memory allows."""

    AUTO = "auto"
    JOINT = "joint"
    EXPERT = "expert"


@dataclass(frozen=True)
class FitSettings:
    """`ridges` weigh the change against the error, the best one is taken; `hold_out` is the share of rows that the fit
    is checked on; fewer rows than `least_tokens` are not fitted; `sweeps` over the experts of a layer. With `balance`
    rows count less the larger their output is."""

    scope: FitScope
    ridges: tuple[float, ...]
    hold_out: float
    least_tokens: int
    sweeps: int
    balance: bool


@dataclass(frozen=True)
class LayerFit:
    """`experts` with their new last products, empty where the fit is not to be used, and then `problem` says why.

    `before` and `after`: squared error of the layer as a share of its squared output, on the rows that the fit did not
    see, weighted as the fit is; `exact` that there was nothing to fit, `packed` that last products are codes.
    """

    experts: Mapping[int, Expert]
    before: float = 0.0
    after: float = 0.0
    problem: str = ""
    exact: bool = False
    packed: bool = False


@dataclass(frozen=True)
class _Part:
    """One expert on the rows that chose it: `rows` int64 [n], what its last product reads times gates [n, u]."""

    number: int
    expert: FeedForward
    rows: torch.Tensor
    features: torch.Tensor

    @property
    def unknowns(self) -> int:
        """u, the rows of unknowns."""
        return self.features.shape[1]


JOINT_UNKNOWNS = 6144
"""Rows of unknowns up to which `auto` solves for all experts at once: a third of a GB for the normal equations."""

JOINT_ELEMENTS = 1 << 28
"""Rows of the sample times rows of unknowns up to which `auto` does: 2 GB."""


def fit_layer(
    layer: MoeLayer, sample: LayerSample, weights: WeightContext, settings: FitSettings, generator: torch.Generator
) -> LayerFit:
    """Fits the last products of all experts that may change, towards what they are.

    The wanted output is `sample.y`, that of the original model; experts without such a product and protected ones
    count with what they give. A fit on the rows that are not held out must lower the error of those that are; then
    all rows are fitted. Raises as `load_expert`.
    """
    parts, residual, packed = _parts(layer, sample, weights)
    if not len(sample) or not parts:
        return LayerFit({}, problem="no expert of it can be fitted", packed=packed)
    if mean_square(residual) <= EXACT * mean_square(sample.y):
        return LayerFit({}, exact=True)
    if len(sample) < settings.least_tokens:
        return LayerFit({}, problem=f"{len(sample)} tokens are too few, at least {settings.least_tokens} are needed")
    wanted = sample.y.double()
    if settings.balance:
        scale = _row_scales(wanted)
        wanted, residual = wanted * scale, residual * scale
        parts = [replace(part, features=part.features * scale[part.rows]) for part in parts]
    held = held_out_rows(sample.sequence, settings.hold_out, generator)
    kept = ~held
    if not held.any() or not kept.any():
        return LayerFit({}, problem=f"{len(sample)} tokens are too few to hold some of them out")
    joint = _is_joint(parts, len(sample), settings.scope)
    trials = _solve(parts, residual, kept, settings, settings.ridges, joint=joint)
    energy = mean_square(wanted[held]) or 1.0
    before = mean_square(residual[held]) / energy
    errors = [mean_square(_remainder(parts, residual, trial)[held]) / energy for trial in trials]
    after, ridge = min(zip(errors, settings.ridges, strict=True))
    if not after < before:
        return LayerFit({}, before, after, f"the error on held-out tokens would go from {before:.2%} to {after:.2%}")
    (changes,) = _solve(parts, residual, torch.ones_like(kept), settings, [ridge], joint=joint)
    experts = {part.number: with_change(part.expert, change) for part, change in zip(parts, changes, strict=True)}
    return LayerFit(experts, before, after)


def _parts(layer: MoeLayer, sample: LayerSample, weights: WeightContext) -> tuple[list[_Part], torch.Tensor, bool]:
    """What can be fitted, what the layer as it is leaves of the wanted output, float64 [R, H], and whether it has last
    products in codes."""
    residual = sample.y.double().clone()
    parts: list[_Part] = []
    packed = False
    for number in range(layer.expert_count):
        rows, gates = sample.chosen(layer, number)
        if not len(rows):
            continue
        expert = load_expert(layer, weights, number)
        x = sample.x[rows].float()
        if not isinstance(expert, FeedForward):
            residual.index_add_(0, rows, -gates[:, None] * expert.apply(x).double())
            continue
        hidden = expert.hidden_activations(x)
        residual.index_add_(0, rows, -gates[:, None] * expert.down.apply(hidden).double())
        packed = packed or isinstance(expert.down.matrix, Quantized)
        features = None if number in layer.protected else fitted_features(expert, hidden)
        if features is not None:
            parts.append(_Part(number, expert, rows, gates[:, None] * features.double()))
    return parts, residual, packed


def _row_scales(y: torch.Tensor) -> torch.Tensor:
    """Factors [R, 1] after which rows of `y` [R, H] far above the median are about as long as it.

    The squared error of few tokens with huge outputs would decide the fit otherwise, although a norm comes after them.
    """
    squares = y.square().sum(dim=1, keepdim=True)
    usual = squares[squares > 0].median() if bool(squares.any()) else squares.new_tensor(1.0)
    return (usual / (usual + squares)).sqrt()


def with_change(expert: FeedForward, change: torch.Tensor) -> FeedForward:
    """The expert with `change` [u, H] added to the part of its last product that reads `fitted_features`."""
    down = expert.down
    matrix: Dense | LowRank
    if isinstance(down.matrix, Dense):
        matrix = Dense((down.matrix.weight.double() + change.T).float())
    else:
        assert isinstance(down.matrix, LowRank)
        matrix = replace(down.matrix, left=(down.matrix.left.double() + change.T).float())
    return replace(expert, down=replace(down, matrix=matrix))


def fitted_features(expert: FeedForward, hidden: torch.Tensor) -> torch.Tensor | None:
    """What the part of the last product reads that can be fitted [n, u]; None where there is none."""
    matrix = expert.down.matrix
    if isinstance(matrix, Dense):
        return hidden
    return hidden @ matrix.right.T if isinstance(matrix, LowRank) and not matrix.left_is_shared else None


def _is_joint(parts: Sequence[_Part], rows: int, scope: FitScope) -> bool:
    if scope is not FitScope.AUTO:
        return scope is FitScope.JOINT
    unknowns = sum(part.unknowns for part in parts)
    return unknowns <= JOINT_UNKNOWNS and unknowns * rows <= JOINT_ELEMENTS


def _solve(
    parts: Sequence[_Part],
    residual: torch.Tensor,
    use: torch.Tensor,
    settings: FitSettings,
    ridges: Sequence[float],
    *,
    joint: bool,
) -> list[list[torch.Tensor]]:
    """For each ridge the change [u, H] of each part, from the rows `use`."""
    if joint:
        sizes = [part.unknowns for part in parts]
        features = torch.zeros(len(residual), sum(sizes), dtype=torch.float64)
        for part, columns in zip(parts, torch.split(features, sizes, dim=1), strict=True):
            columns[part.rows] = part.features
        return [list(torch.split(change, sizes)) for change in ridge_changes(features[use], residual[use], ridges)]
    return [_sweep(parts, residual, use, ridge, settings.sweeps) for ridge in ridges]


def _sweep(
    parts: Sequence[_Part], residual: torch.Tensor, use: torch.Tensor, ridge: float, sweeps: int
) -> list[torch.Tensor]:
    """One expert after the other takes what the others leave; each sweep lowers the error further."""
    left = residual.clone()
    changes = [torch.zeros(part.unknowns, residual.shape[1], dtype=torch.float64) for part in parts]
    for _ in range(sweeps):
        for part, change in zip(parts, changes, strict=True):
            wanted = left[part.rows] + part.features @ change
            inside = use[part.rows]
            (new,) = ridge_changes(part.features[inside], wanted[inside], [ridge])
            left.index_add_(0, part.rows, part.features @ (change - new))
            change.copy_(new)
    return changes


def _remainder(parts: Sequence[_Part], residual: torch.Tensor, changes: Sequence[torch.Tensor]) -> torch.Tensor:
    left = residual.clone()
    for part, change in zip(parts, changes, strict=True):
        left.index_add_(0, part.rows, -(part.features @ change))
    return left
