"""Several models of one seed as one model of the same size."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch

from moec.calibration.data import IDS_SUFFIXES, CalibrationData, read_data
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.frontend.other_sources import OtherSource
from moec.ir import Operation
from moec.passes.model_merging.fitting import CoefficientFit, FitSettings
from moec.passes.model_merging.task_vectors import MergedWeight, layer_name, layer_names, merged
from moec.passes.upcycling.sources import average_weights
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.weights.context import WeightContext
from moec.weights.expression import Cast
from moec.weights.expression_parser import parse_expression


class Method(Enum):
    """How models become one."""

    AVERAGE = "average"  # the mean of all, the first one included
    TASK_VECTORS = "task-vectors"  # the first one, plus the differences of the others from it times coefficients
    FIT = "fit"  # the same, with coefficients for each layer that are fitted on text


@register_pass("merge-models")
@dataclass(frozen=True)
class MergeModels(Pass):
    """Makes one model of several (`--with`): their mean, or the first one plus task vectors of the others.

    1. `average` takes the mean of every weight in float32 and rounds it once.
    2. `task-vectors` is theta_0 + sum_t c_t (theta_t - theta_0); one coefficient of 1 among zeros is that model.
    3. `fit` learns c = sigma(a) for each layer, model and piece of a tensor on text without labels: KL to the
       logits of each model on its own text, plus the distance of hidden states behind each layer relative to theirs,
       plus a penalty for leaving the start. The best coefficients that were met are taken, so that the objective never
       ends above its start. One model and the derivative by its weights are in memory, however many models there are.

    Expert Merging (2025); its penalty of 5 left a small model at its start. All tensors have equally many pieces, where
    Expert Merging++ gives more to those that matter more.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("weights that are no longer those of the first model")
    tokens_seen = Statistic("tokens of the fit, over all models")
    method: Method = option("how models become one", Method.FIT)
    coefficients: tuple[float, ...] = option("task-vectors: one for each model but the first, or one for all", (0.1,))
    start: float = option("fit: the coefficient to begin with", 0.1)
    pieces: int = option("fit: pieces of each tensor with coefficients of their own", 1)
    texts: tuple[Path, ...] = option("fit: a text for each model but the first; else what --calibration names", ())
    sequences: int = option("fit: windows of each text", 16)
    length: int = option("fit: tokens of a window", 64)
    batch: int = option("fit: windows that run at once", 8)
    steps: int = option("fit: steps of Adam", 20)
    rate: float = option("fit: the learning rate", 0.3)
    penalty: float = option("fit: weight of the mean distance of coefficients from their start", 0.1)
    hidden: float = option("fit: weight of the distance of hidden states", 1.0)

    def __post_init__(self) -> None:
        for name in ("pieces", "sequences", "length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.steps < 0 or self.rate <= 0 or self.penalty < 0 or self.hidden < 0:
            raise ValueError("rate must be positive, and steps, penalty and hidden not negative")
        if not 0 < self.start < 1:
            raise ValueError("start must be within 0..1")
        if not self.coefficients:
            raise ValueError("coefficients must not be empty")

    def run(self, op: Operation, context: PassContext) -> None:
        weights, others = context.require_weights(), context.require_others()
        if self.method is Method.AVERAGE:
            context.count(self.changed, average_weights(op, weights, [None, *others], ()))
            return
        found = _weights_of(op, others)
        layers = layer_names(op)
        if self.method is Method.TASK_VECTORS:
            if len(self.coefficients) not in (1, len(others)):
                raise UsageError(
                    f"{len(self.coefficients)} coefficients do not fit {len(others)} models besides the first",
                    hint="give one for each, or one for all",
                )
            row = self.coefficients * (len(others) if len(self.coefficients) == 1 else 1)
            chosen = torch.tensor(row)[None, :, None].expand(len(layers), -1, 1)
        else:
            chosen = self._fit(op, found, layers, others, context)
        known: dict[str, str] = {}
        for item in found:
            # what layers share is merged as the first of them says
            if item.sources[0] not in known:
                known[item.sources[0]] = _merged_source(item, chosen[layers.index(item.layer)], weights)
            source = known[item.sources[0]]
            context.count(self.changed, int(source != item.op.source))
            item.op.source = source

    def _fit(
        self,
        op: Operation,
        found: list[MergedWeight],
        layers: list[str],
        others: tuple[OtherSource, ...],
        context: PassContext,
    ) -> torch.Tensor:
        assert context.module is not None
        data = self._data(len(others), context)
        settings = FitSettings(self.start, self.pieces, self.steps, self.rate, self.penalty, self.hidden, self.batch)
        fit = CoefficientFit(context.module, found, layers, data).run(settings)
        context.count(self.tokens_seen, sum(item.tokens for item in data))
        context.remark(op, f"the objective of the fit goes from {fit.before:.4f} to {fit.after:.4f}")
        for number, name in enumerate(layers):
            means = ", ".join(f"{float(value):.3f}" for value in fit.coefficients[number].mean(1))
            context.remark(op, f"{name or 'outside of layers'}: mean coefficients {means}")
        return fit.coefficients

    def _data(self, models: int, context: PassContext) -> list[CalibrationData]:
        """A text for each model but the first."""
        assert context.module is not None
        if self.texts and len(self.texts) != models:
            raise UsageError(f"{len(self.texts)} texts do not fit {models} models besides the first")
        given = context.calibration_file
        ids = given if given is not None and given.suffix in IDS_SUFFIXES and not self.texts else None
        common = () if given is None or ids is not None else (given,)
        return [
            read_data(
                context.module,
                texts=(self.texts[number],) if self.texts else common,
                tokens=ids,
                sequences=self.sequences,
                length=self.length,
                seed=context.seed,
            )
            for number in range(models)
        ]


def _weights_of(op: Operation, others: tuple[OtherSource, ...]) -> list[MergedWeight]:
    found = []
    for weight in op.walk():
        if isinstance(weight, WeightOp):
            own = parse_expression(weight.source)
            sources = (weight.source, *[str(other.expression(own)) for other in others])
            found.append(MergedWeight(weight, layer_name(weight.weight_name), sources))
    return found


def _merged_source(item: MergedWeight, coefficients: torch.Tensor, weights: WeightContext) -> str:
    """The merged weight [models, pieces]; that of one model, as it is, where the coefficients say so."""
    if len({weights.digest(source) for source in item.sources}) == 1:
        return item.sources[0]
    rows = [row.tolist() for row in coefficients]
    ones = [number for number, row in enumerate(rows) if set(row) == {1.0}]
    zeros = [row for row in rows if set(row) == {0.0}]
    if len(zeros) == len(rows):
        return item.sources[0]
    if len(ones) == 1 and len(zeros) == len(rows) - 1:
        return item.sources[1 + ones[0]]
    own = parse_expression(item.sources[0])
    # read as float32, but rounded to what the models are stored in
    dtype = weights.shape_dtype(own.operand if isinstance(own, Cast) else own)[1]
    tensors = [weights.load(source) for source in item.sources]
    if weights.store is None:
        raise UsageError("merged weights need a store", hint="give the folder of a store")
    result = merged(tensors[0].float(), [tensor.float() for tensor in tensors[1:]], coefficients)
    stored = weights.store.put(result.to(dtype))
    return str(Cast(stored, own.dtype) if isinstance(own, Cast) else stored)
