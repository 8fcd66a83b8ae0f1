"""What the experts that a token ranks low compute for it, and light modules that come close."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from moec.calibration.sample import LayerSample, spread_rows
from moec.experts import Affine, Constant, Expert, FeedForward, MoeLayer, load_expert
from moec.passes.auxiliary_experts.regression import fit_affine, fit_constant
from moec.passes.factoring.sides import parameters
from moec.weights.context import WeightContext

# Rows that a fit for experts without enough rows of their own is made on.
_POOLED_ROWS = 8192


class Base(Enum):
    """What the experts that run in full are left with: their own gates, or all of the token's gates."""

    SKIP = "skip"
    RENORM = "renorm"


class ModuleKind(Enum):
    """What stands in the place of an expert that a token ranks low."""

    NONE = "none"
    CONSTANT = "constant"
    AFFINE = "affine"


@dataclass(frozen=True)
class ModuleForm:
    """The kind of a module, the rank of an affine one, and the fewest rows that an expert's own fit takes."""

    kind: ModuleKind
    rank: int
    coverage: int


@dataclass(frozen=True)
class Fitted:
    """Modules by stored expert for one base, and the squared error of the layer's output over the rows."""

    base: Base
    modules: dict[int, Expert]
    error: float


@dataclass
class AuxiliaryRows:
    """The slots of a sample's rows at one layer, those of ranks below `main` apart from the others.

    `expert` is stored, int64 [n, K] with -1 for an empty slot; `gates` float64 [n, K].
    """

    layer: MoeLayer
    sample: LayerSample
    weights: WeightContext
    main: int
    expert: torch.Tensor = field(init=False)
    gates: torch.Tensor = field(init=False)
    _correction: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        run = self.sample.route(self.layer)
        self.expert, self.gates = run.stored_ids, run.gates.double()

    def auxiliary(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows int64 [r], gates float64 [r]) for which a stored expert is ranked `main` or lower."""
        hit = self.expert[:, self.main :] == number
        rows = hit.any(1).nonzero()[:, 0]
        return rows, torch.where(hit, self.gates[:, self.main :], 0.0).sum(1)[rows]

    def outputs(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """What a stored expert makes of rows, float64 [r, H]."""
        return load_expert(self.layer, self.weights, number).apply(self.sample.x[rows].float()).double()

    def correction(self) -> torch.Tensor:
        """What renormalising adds to the output, float64 [n, H]: (G / G_main - 1) times the sum over the main slots.

        G is the sum of a token's gates, G_main that of its main slots.
        """
        if self._correction is None:
            total, kept = self.gates.sum(1), self.gates[:, : self.main].sum(1)
            scale = torch.where(kept > 0, total / kept.clamp_min(torch.finfo(torch.float64).tiny), 1.0) - 1
            result = torch.zeros(len(self.gates), self.layer.hidden_size, dtype=torch.float64)
            for number in range(self.layer.expert_count):
                hit = self.expert[:, : self.main] == number
                rows = hit.any(1).nonzero()[:, 0]
                if len(rows):
                    gate = torch.where(hit, self.gates[:, : self.main], 0.0).sum(1)[rows]
                    result.index_add_(0, rows, (gate * scale[rows])[:, None] * self.outputs(number, rows))
            self._correction = result
        return self._correction

    def targets(self, base: Base, number: int, rows: torch.Tensor) -> torch.Tensor:
        """What a module should give for an expert's auxiliary rows, float64 [r, H].

        With renormalised gates the correction comes off, divided by the sum of the token's auxiliary gates.
        """
        found = self.outputs(number, rows)
        if base is Base.RENORM:
            auxiliary = self.gates[rows, self.main :].sum(1, keepdim=True)
            found = found - self.correction()[rows] / auxiliary
        return found

    def fit(self, base: Base, form: ModuleForm) -> Fitted:
        """A module for every expert that is not protected.

        An expert with fewer than `coverage` auxiliary rows gets the module that fits all experts' rows together, unless
        these are too few as well.
        """
        modules: dict[int, Expert] = {}
        numbers = [number for number in range(self.layer.expert_count) if number not in self.layer.protected]
        error = torch.zeros(len(self.gates), self.layer.hidden_size, dtype=torch.float64)
        pooled = self._pooled(base, form, numbers)
        for number in numbers:
            rows, gates = self.auxiliary(number)
            targets = self.targets(base, number, rows)
            module = pooled
            if len(rows) >= form.coverage or pooled is None:
                module = self._module(form, rows, targets, gates)
            if module is not None:
                modules[number] = module
            found = 0.0 if module is None else module.apply(self.sample.x[rows].float()).double()
            error.index_add_(0, rows, gates[:, None] * (found - targets))
        return Fitted(base, modules, float(error.square().sum()))

    def starved(self, form: ModuleForm) -> list[int]:
        """Experts, protected ones left out, that have too few auxiliary rows for a fit of their own."""
        counts = {number: len(self.auxiliary(number)[0]) for number in range(self.layer.expert_count)}
        return [n for n, count in counts.items() if count < form.coverage and n not in self.layer.protected]

    def energy(self) -> float:
        """The squared norm of the layer's outputs over the rows."""
        total = torch.zeros(len(self.gates), self.layer.hidden_size, dtype=torch.float64)
        for number in range(self.layer.expert_count):
            hit = self.expert == number
            rows = hit.any(1).nonzero()[:, 0]
            if len(rows):
                gate = torch.where(hit, self.gates, 0.0).sum(1)[rows]
                total.index_add_(0, rows, gate[:, None] * self.outputs(number, rows))
        return float(total.square().sum())

    def active_parameters(self, modules: dict[int, Expert]) -> tuple[float, float]:
        """Numbers that a token multiplies with in this layer's experts, on average: before, and with the modules."""
        before = after = 0
        for number in range(self.layer.expert_count):
            own = active_size(load_expert(self.layer, self.weights, number))
            main = int((self.expert[:, : self.main] == number).sum())
            rest = int((self.expert[:, self.main :] == number).sum())
            light = own if number in self.layer.protected else active_size(modules.get(number))
            before += (main + rest) * own
            after += main * own + rest * light
        return before / len(self.expert), after / len(self.expert)

    def _module(
        self, form: ModuleForm, rows: torch.Tensor, targets: torch.Tensor, gates: torch.Tensor
    ) -> Affine | Constant | None:
        if form.kind is ModuleKind.NONE:
            return None
        if not len(rows):
            return Constant(torch.zeros(self.layer.hidden_size))
        importance = gates.square()
        if form.kind is ModuleKind.CONSTANT:
            return Constant(fit_constant(targets, importance).float())
        found = fit_affine(self.sample.x[rows], targets, importance, form.rank)
        return _padded(found.left.float(), found.right.float(), found.bias.float(), form.rank)

    def _pooled(self, base: Base, form: ModuleForm, numbers: list[int]) -> Affine | Constant | None:
        """The module of all auxiliary rows, where some expert needs it; None where there are too few of them, too."""
        starved = self.starved(form)
        if not starved or form.kind is ModuleKind.NONE:
            return None
        parts = []
        share = max(1, _POOLED_ROWS // len(numbers))
        for number in numbers:
            rows, gates = self.auxiliary(number)
            some = spread_rows(len(rows), share)
            parts.append((rows[some], self.targets(base, number, rows[some]), gates[some]))
        rows, targets, gates = (torch.cat(items) for items in zip(*parts, strict=True))
        return self._module(form, rows, targets, gates) if len(rows) >= form.coverage else None


def active_size(expert: Expert | None) -> int:
    """Numbers in the matrices that one token is multiplied with."""
    if isinstance(expert, Affine):
        return expert.left.numel() + expert.right.numel()
    if not isinstance(expert, FeedForward):
        return 0
    return parameters(expert, shared=True)


def _padded(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor, rank: int) -> Affine:
    """The map with factors of exactly `rank`, so that all of a layer's modules are one class."""
    missing = rank - right.shape[0]
    return Affine(
        torch.nn.functional.pad(left, (0, missing)).contiguous(),
        torch.nn.functional.pad(right, (0, 0, 0, missing)).contiguous(),
        bias,
    )
