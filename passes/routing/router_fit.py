"""Gradient steps on the router of one layer alone, on rows that were captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.builtin import WeightOp
from moec.experts import MoeLayer
from moec.experts.router_source import router_path, router_weights
from moec.experts.run import symbols_of
from moec.ir import TensorType, Value
from moec.reference.element_types import ElementTypes
from moec.reference.frame import ExpertsLowering, Frame, RunSettings
from moec.reference.kernels import prepare
from moec.reference.weight_loader import WeightLoader
from moec.weights.context import WeightContext

_REUSE = 0.999


class Loss(Enum):
    """How far logits z are from labels l."""

    BCE = "bce"  # binary cross-entropy of sigmoid(z) and l (MoEfication)
    KL = "kl"  # sum p log(p / q) with p = softmax(z), q = softmax(l) (FactorLLM)
    CROSS_ENTROPY = "ce"  # of softmax(z) and the best label, smoothed by a half, and a quarter of it soft (Read-ME)
    FOCAL = "focal"  # of softmax(z) and the best label, where z is unsure and where labels are rare (Dr.LLM)


@dataclass(frozen=True)
class FitSettings:
    """`epochs` of Adam at `rate` on `batch` rows; `balance` weighs the Switch loss, `k` experts are chosen."""

    loss: Loss
    epochs: int
    batch: int
    rate: float
    balance: float
    k: int
    seed: int


@dataclass(frozen=True)
class RouterFit:
    """Held-out losses, and the weights of the least one; none where no epoch helped."""

    before: float
    after: float
    weights: Mapping[WeightOp, torch.Tensor]


class RouterRows:
    """The logits of a layer for rows of its sample, differentiable by the weights of the router."""

    def __init__(self, layer: MoeLayer, weights: WeightContext, sample: LayerSample) -> None:
        self._layer = layer
        self._path = router_path(layer)
        self._loader = WeightLoader(weights, ElementTypes(torch.float32))
        routed = layer.router.tensor("input")
        reads_rows = any(value is layer.experts.x for op in self._path for value in op.operands)
        # a path that starts elsewhere is cut off: the sample knows what the router read
        self._start = layer.experts.x if reads_rows else routed
        if not reads_rows:
            self._path = [layer.router]
        self._rows = (sample.x if reads_rows else sample.router_input).float()
        self.weights = [
            weight
            for weight in router_weights(layer)
            if any(value.defining_op is weight for op in self._path for value in op.operands)
        ]
        self.values = {weight: self._loader.load(weight).clone() for weight in self.weights}

    def logits(self, rows: torch.Tensor, values: Mapping[WeightOp, torch.Tensor]) -> torch.Tensor:
        """[len(rows), R] for the numbers of rows."""
        return self._run(self._layer.router.result, rows, values)

    def features(self, values: Mapping[WeightOp, torch.Tensor]) -> torch.Tensor | None:
        """What the router reads of all rows, [n, F]; None where no weight decides it."""
        if len(self._path) == 1:
            return None
        with torch.no_grad():
            return self._run(self._layer.router.tensor("input"), torch.arange(len(self._rows)), values)

    def _run(self, wanted: Value, rows: torch.Tensor, values: Mapping[WeightOp, torch.Tensor]) -> torch.Tensor:
        given = self._rows[rows]
        self._loader.overrides = {weight.weight_name: value for weight, value in values.items()}
        settings = RunSettings(ElementTypes(torch.float32), self._loader, ExpertsLowering.GROUPED)
        frame = Frame(settings, symbols_of(self._layer, len(given)), {})
        kind = self._start.type
        assert isinstance(kind, TensorType)
        frame.values[self._start] = given.reshape([frame.size(size) for size in kind.shape])
        for op in self._path:
            frame.values.update(zip(op.results, prepare(op)(frame), strict=True))
        return frame.tensor(wanted).reshape(len(given), -1)


def fit_router(router: RouterRows, labels: torch.Tensor, held_out: torch.Tensor, settings: FitSettings) -> RouterFit:
    """Trains on the rows that are not `held_out` (bool [n]) towards labels float32 [n, R]."""
    learned, judged = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    values = {weight: value.clone().requires_grad_() for weight, value in router.values.items()}

    def judge() -> float:
        with torch.no_grad():
            return float(_loss(router.logits(judged, values), labels[judged], settings))

    before = best = judge()
    kept: dict[WeightOp, torch.Tensor] = {}
    optimizer = torch.optim.Adam(list(values.values()), lr=settings.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, settings.epochs)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for rows in torch.split(order, settings.batch):
            optimizer.zero_grad()
            logits = router.logits(rows, values)
            loss = _loss(logits, labels[rows], settings)
            if settings.balance:
                loss = loss + settings.balance * _balance(logits, settings.k)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        decay.step()
        now = judge()
        if now < best:
            best = now
            kept = {weight: value.detach().clone() for weight, value in values.items()}
    return RouterFit(before, best, kept)


def _loss(logits: torch.Tensor, labels: torch.Tensor, settings: FitSettings) -> torch.Tensor:
    match settings.loss:
        case Loss.BCE:
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        case Loss.KL:
            given, wanted = logits.log_softmax(1), labels.log_softmax(1)
            return (given.exp() * (given - wanted)).sum(1).mean()
        case Loss.CROSS_ENTROPY:
            hard = torch.nn.functional.cross_entropy(logits, labels.argmax(1), label_smoothing=0.5)
            centred = 10 * (labels - labels.mean(1, keepdim=True))
            return 0.75 * hard + 0.25 * torch.nn.functional.cross_entropy(logits, centred.softmax(1))
        case Loss.FOCAL:
            return _focal(logits, labels.argmax(1))


def _focal(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """-w (1 - p)^2 log p of the right outputs int64 [n], w = (1 - b) / (1 - b^count) for each, mean 1 (Cui et al.)."""
    counts = torch.bincount(best, minlength=logits.shape[1]).clamp(min=1)
    weights = ((1 - _REUSE) / (1 - _REUSE**counts))[best]
    log = logits.log_softmax(1).gather(1, best[:, None])[:, 0]
    return -(weights / weights.mean() * (1 - log.exp()).square() * log).mean()


def _balance(logits: torch.Tensor, k: int) -> torch.Tensor:
    """E sum_e f_e p_e, f_e the share of choices and p_e the mean softmax score."""
    scores = logits.softmax(1)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(k, dim=1).indices, 1.0 / k)
    return scores.shape[1] * (chosen.mean(0) * scores.mean(0)).sum()
