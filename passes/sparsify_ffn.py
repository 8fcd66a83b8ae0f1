"""Dense feed-forward blocks in which each token runs a few neurons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist
from typing import ClassVar

import torch

from moec.errors import UsageError
from moec.experts import FeedForward, UnreadableExpertError, find_dense_layers, load_dense
from moec.experts.dense import DenseLayer, replace_dense
from moec.ir import Operation
from moec.passes.sparsification.neuron_choice import (
    Predictor,
    fit_predictor,
    mask_best,
    mask_statistically,
    neuron_scores,
    soft_threshold,
    standard_scores,
)
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_ROWS_PER_UNKNOWN = 32


class NeuronChoice(Enum):
    """Which neurons a token runs."""

    TOP_K = "top-k"  # exactly those that give most
    STATISTICAL = "statistical"  # those whose gate lies above mean + z standard deviations of the token's gates
    SOFT = "soft"  # the same, and the gates of the others are lowered by the threshold


class Threshold(Enum):
    """Where the z of the statistical choices comes from."""

    CALIBRATED = "calibrated"  # so that the share of neurons is met on the calibration sample
    GAUSSIAN = "gaussian"  # the quantile of the normal distribution


@register_pass("sparsify-ffn")
@dataclass(frozen=True)
class SparsifyFfn(Pass):
    """Lets each token use a share of the neurons of every dense feed-forward block.

    1. `top-k` keeps the round(keep * width) neurons with the largest |h_j| ||D_j||, the best that a choice of neurons
       can do; with `predictor-rank` the ranking comes from a map of that rank, fitted to it on the calibration sample,
       which does not need the neurons themselves.
    2. `statistical` keeps neurons whose gate (what the activation is applied to) exceeds mean + z deviation of the
       token's gates: no sorting. `soft` is the same with relu(gate - threshold) in place of the gate, as Gemma3n was
       trained; a model that was not loses more by it.
    3. `keep=1` changes nothing. In ONNX a run of one token, which a decoder makes for each token that it writes, reads
       the weights of the neurons in use alone where `keep` is small (up to 0.2): of down, for `statistical` of up, too,
       and with a predictor of all matrices. Several tokens at once need nearly all neurons, so these are computed and
       masked.

    Spark Transformer; the formula of `soft` is that of Gemma3n.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("dense blocks")
    keep: float = option("share of the neurons that each token uses")
    kind: NeuronChoice = option("which neurons those are", NeuronChoice.TOP_K)
    threshold: Threshold = option("where the threshold of statistical choices comes from", Threshold.CALIBRATED)
    predictor_rank: int = option("top-k: rank of a map that predicts the ranking, 0 for the ranking itself", 0)
    ridge: float = option("damping of the predictor as a share of the mean squared input", 1e-4)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep {self.keep:g} is not within (0, 1]")
        if self.predictor_rank < 0 or self.ridge < 0:
            raise ValueError("predictor-rank and ridge must not be negative")
        if self.predictor_rank and self.kind is not NeuronChoice.TOP_K:
            raise ValueError("a predictor ranks neurons, which only kind=top-k does")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        if self.keep == 1:
            return
        for layer in find_dense_layers(op):
            try:
                block = load_dense(layer, weights)
            except UnreadableExpertError as error:
                context.refuse(layer.op, error.message, self.pass_name)
                continue
            rows = self._rows(layer, context)
            predictor = self._predictor(layer, block, rows, context)
            z = self._z(block, rows)
            new = replace_dense(layer, weights, block)
            match self.kind:
                case NeuronChoice.TOP_K:
                    mask_best(new, block, weights, self._count(block), predictor)
                case NeuronChoice.STATISTICAL:
                    mask_statistically(new, block, z)
                case NeuronChoice.SOFT:
                    soft_threshold(new, block, z)
            context.count(self.changed)
            context.remark(new.op, self._remark(block, rows, z))

    def _count(self, block: FeedForward) -> int:
        return max(1, round(self.keep * block.width))

    def _rows(self, layer: DenseLayer, context: PassContext) -> torch.Tensor | None:
        """The calibration rows [n, H] of a block, where they are needed or there anyway."""
        needed = bool(self.predictor_rank) or (
            self.kind is not NeuronChoice.TOP_K and self.threshold is Threshold.CALIBRATED
        )
        there = context.module is not None and context.module.calibration is not None
        if not needed and not there:
            return None
        calibration = context.require_calibration()
        if not needed and not calibration.knows(layer):
            return None
        return calibration.sample(layer).x

    def _predictor(
        self, layer: DenseLayer, block: FeedForward, rows: torch.Tensor | None, context: PassContext
    ) -> Predictor | None:
        if not self.predictor_rank or rows is None:
            return None
        largest = min(rows.shape[1], block.width)
        if self.predictor_rank > largest:
            raise UsageError(
                f"a predictor of rank {self.predictor_rank} is larger than {largest}, the most that it can be",
                where=layer.name,
            )
        wanted = _ROWS_PER_UNKNOWN * (rows.shape[1] + 1)
        if len(rows) < wanted:
            text = f"the predictor was fitted to {len(rows)} rows; give {wanted} or more"
            context.warn(layer.op, text)
        return fit_predictor(rows, neuron_scores(block, rows), self.predictor_rank, self.ridge)

    def _z(self, block: FeedForward, rows: torch.Tensor | None) -> float:
        """How many standard deviations above the mean the threshold lies."""
        if self.threshold is Threshold.CALIBRATED and rows is not None and self.kind is not NeuronChoice.TOP_K:
            scores = standard_scores(block, rows).flatten()
            place = min(len(scores) - 1, round((1 - self.keep) * len(scores)))
            return float(scores.sort().values[place])
        return NormalDist().inv_cdf(1 - self.keep)

    def _remark(self, block: FeedForward, rows: torch.Tensor | None, z: float) -> str:
        if self.kind is NeuronChoice.TOP_K:
            return f"each token uses {self._count(block)} of {block.width} neurons"
        text = f"gates above mean {z:+.4f} deviations are used"
        if rows is None:
            return text
        return f"{text}: {float((standard_scores(block, rows) > z).double().mean()):.2%} on the calibration text"
