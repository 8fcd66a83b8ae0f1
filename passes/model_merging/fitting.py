"""Coefficients for a merged model, fitted on text without labels (Expert Merging)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.artifact.tokens import TokenBatch, function_inputs
from moec.calibration.data import CalibrationData
from moec.module import Module
from moec.passes.model_merging.task_vectors import MergedWeight, merged
from moec.reference.executor import Executor
from moec.reference.layers import Segment, layer_segments


@dataclass(frozen=True)
class FitSettings:
    """`start` is the coefficient to begin with, `penalty` the weight of its mean distance from there; `hidden` that of
    the hidden states, `steps` of Adam with `rate`, on `batch` sequences of each model's text at once."""

    start: float
    pieces: int
    steps: int
    rate: float
    penalty: float
    hidden: float
    batch: int


@dataclass(frozen=True)
class Fit:
    """`coefficients` [layers, models, pieces] of the smallest objective, and the objective at the start and there."""

    coefficients: torch.Tensor
    before: float
    after: float


@dataclass(frozen=True)
class _Target:
    """What an expert makes of its text: the inputs, its log-probabilities and its hidden states behind each layer."""

    inputs: Mapping[str, torch.Tensor]
    kept: torch.Tensor
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class CoefficientFit:
    """Minimises over a: mean over models t of KL(p_t || p) + hidden ||h - h_t||^2 / ||h_t||^2, on the text of t, plus
    the penalty times the mean of |sigma(a) - start|.

    In memory are the merged model and the derivative by its weights, whatever the number of models: their tensors are
    read one by one, to merge them and for the derivative by a, which is sum <dL/dtheta, theta_t - theta_0> c (1 - c).
    """

    def __init__(
        self, module: Module, weights: Sequence[MergedWeight], layers: Sequence[str], data: Sequence[CalibrationData]
    ) -> None:
        """`data` has one text for each model but the base."""
        self._executor = Executor(module.op, module.weights)
        self._segments: tuple[Segment, ...] = layer_segments(module.main.body, self._executor.steps)
        self._weights, self._layers = weights, list(layers)
        self._module, self._data = module, data

    def run(self, settings: FitSettings) -> Fit:
        """The best coefficients that were met."""
        targets = [self._targets(number, data, settings.batch) for number, data in enumerate(self._data)]
        start = torch.logit(torch.tensor(settings.start, dtype=torch.float64)).float()
        shape = (len(self._layers), len(self._data), settings.pieces)
        unknown = torch.full(shape, float(start)).requires_grad_()
        optimizer = torch.optim.Adam([unknown], lr=settings.rate)
        best, before, after = unknown.detach().clone(), float("inf"), float("inf")
        for step in range(settings.steps + 1):
            objective = 0.0
            unknown.grad = None
            coefficients = torch.sigmoid(unknown)
            model = self._merged(coefficients.detach())
            for group in targets:
                for target in group:
                    loss = self._loss(target, model, settings) / (len(targets) * len(group))
                    loss.backward()  # type: ignore[no-untyped-call]
                    objective += float(loss.detach())
            pull = settings.penalty * (coefficients - settings.start).abs().mean()
            slope = self._slope(coefficients.detach(), model)
            torch.autograd.backward([pull, coefficients], [torch.ones(()), slope])
            objective += float(pull.detach())
            if step == 0:
                before = objective
            if objective < after:
                best, after = unknown.detach().clone(), objective
            if step < settings.steps:
                optimizer.step()
        return Fit(torch.sigmoid(best), before, after)

    def _targets(self, number: int, data: CalibrationData, batch: int) -> list[_Target]:
        load = self._module.weights.load
        overrides = {weight.op.weight_name: load(weight.sources[number + 1]).float() for weight in self._weights}
        found = []
        for tokens in data.batches(batch, padding_in_front=False):
            inputs, kept = self._inputs(tokens)
            with torch.no_grad():
                logits, hidden = self._forward(inputs, overrides)
            found.append(_Target(inputs, kept, torch.log_softmax(logits[kept], -1), tuple(h[kept] for h in hidden)))
        return found

    def _inputs(self, tokens: TokenBatch) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        return function_inputs(self._module.main, tokens), torch.from_numpy(tokens.mask).bool()

    def _tensors(self, weight: MergedWeight) -> list[torch.Tensor]:
        return [self._module.weights.load(source).float() for source in weight.sources]

    def _merged(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights of the merged model by name, leaves of its derivative."""
        model = {}
        for weight in self._weights:
            tensors = self._tensors(weight)
            own = coefficients[self._layers.index(weight.layer)]
            model[weight.op.weight_name] = merged(tensors[0], tensors[1:], own).requires_grad_()
        return model

    def _slope(self, coefficients: torch.Tensor, model: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The derivative of the objective by each coefficient, from that by the weights."""
        slope = torch.zeros_like(coefficients)
        for weight in self._weights:
            gradient = model[weight.op.weight_name].grad
            if gradient is None:
                continue
            own = coefficients[self._layers.index(weight.layer)].clone().requires_grad_()
            tensors = self._tensors(weight)
            (part,) = torch.autograd.grad(merged(tensors[0], tensors[1:], own), own, gradient)
            slope[self._layers.index(weight.layer)] += part
        return slope

    def _loss(self, target: _Target, model: Mapping[str, torch.Tensor], settings: FitSettings) -> torch.Tensor:
        with torch.enable_grad():
            logits, hidden = self._forward(target.inputs, model)
            log = torch.log_softmax(logits[target.kept], -1)
            loss = torch.nn.functional.kl_div(log, target.logits, reduction="batchmean", log_target=True)
            for mine, wanted in zip(hidden, target.hidden, strict=True):
                loss = loss + settings.hidden * (mine[target.kept] - wanted).square().mean() / wanted.square().mean()
        return loss

    def _forward(
        self, inputs: Mapping[str, torch.Tensor], overrides: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [batch, seq, vocabulary], and the hidden states [batch, seq, H] that layers give to later ones."""
        hidden = []
        with self._executor.session(inputs, overrides=overrides) as execution:
            for segment in self._segments[:-1]:
                execution.run(segment.steps)
                states = [execution.values[value] for value in segment.outputs if value in execution.values]
                hidden += [state for state in states if state.is_floating_point() and state.dim() == 3][-1:]
            execution.run(self._segments[-1].steps)
            return next(iter(execution.results().values())), hidden
