"""Scores of experts from sums over calibration tokens: the higher, the more is lost with the expert."""

from __future__ import annotations

from enum import Enum

import torch

from moec.calibration.statistics import LayerStatistics


class Criterion(Enum):
    """How experts are ranked; f is an expert's output, g its gate, sums are over the tokens that chose it.

    A mean over the chosen tokens ignores how often an expert is used, a sum does not.
    """

    FREQUENCY = "frequency"  # tokens
    GATE_MASS = "gate-mass"  # sum of g (SEER-MoE's soft counts)
    ACTIVATION_NORM = "activation-norm"  # sum of ||f||
    MEAN_ACTIVATION_NORM = "mean-activation-norm"  # mean of ||f||
    REAP_MEAN = "reap-mean"  # mean of g ||f|| (REAP, as published)
    REAP_SUM = "reap-sum"  # sum of g ||f||
    OUTPUT_ENERGY = "output-energy"  # sum of g^2 ||f||^2
    MONE = "mone"  # tokens times the variance of f (MoNE)
    LEAVE_ONE_OUT = "leave-one-out"  # squared error of the layer without the expert, tokens choosing again
    NAEE_GREEDY = "naee-greedy"  # the same, removing the least important one after the other
    NAEE_EXACT = "naee-exact"  # the subset with the least error of the layer, all subsets tried (NAEE)
    RANDOM = "random"

    @property
    def needs_sample(self) -> bool:
        """Whether it computes experts on rows instead of reading sums."""
        return self in (Criterion.LEAVE_ONE_OUT, Criterion.NAEE_GREEDY, Criterion.NAEE_EXACT)


def expert_scores(criterion: Criterion, statistics: LayerStatistics, seed: int = 0) -> torch.Tensor:
    """[E] float64, for every criterion that needs no sample. An expert that no token chose has score 0."""
    count = statistics.count.clamp(min=1)
    match criterion:
        case Criterion.FREQUENCY:
            return statistics.count
        case Criterion.GATE_MASS:
            return statistics.gate_mass
        case Criterion.ACTIVATION_NORM:
            return statistics.output_norm_sum
        case Criterion.MEAN_ACTIVATION_NORM:
            return statistics.output_norm_sum / count
        case Criterion.REAP_MEAN:
            return statistics.gated_norm_sum / count
        case Criterion.REAP_SUM:
            return statistics.gated_norm_sum
        case Criterion.OUTPUT_ENERGY:
            return statistics.gated_square_sum
        case Criterion.MONE:
            mean = statistics.output_sum / count[:, None]
            variance = statistics.output_square_sum / count - mean.square().sum(1)
            return statistics.count * variance.clamp(min=0)
        case Criterion.RANDOM:
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(len(statistics.count), generator=generator, dtype=torch.float64)
    raise ValueError(f"{criterion.value} needs a sample")
