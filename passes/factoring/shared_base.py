"""One base for many matrices, and what each of them is beyond it (D2-MoE, arXiv 2502.17298)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.errors import UsageError
from moec.passes.factoring.decomposition import rank_for_parameters


def weighted_base(weights: Sequence[torch.Tensor], importance: Sequence[torch.Tensor | float]) -> torch.Tensor:
    """sum of importance * weight / sum of importance, float64 [out, in].

    The importance of a weight is a number, such as how often its expert is chosen, or one number per element, such as
    its Fisher information. Where all are 0 the base is the plain mean.
    """
    total = torch.zeros_like(weights[0], dtype=torch.float64)
    plain = torch.zeros_like(total)
    mass = torch.zeros_like(total)
    for weight, factor in zip(weights, importance, strict=True):
        number = weight.to(torch.float64)
        scale = torch.as_tensor(factor, dtype=torch.float64)
        total += scale * number
        mass += scale
        plain += number / len(weights)
    return torch.where(mass > 0, total / mass.clamp_min(torch.finfo(torch.float64).tiny), plain)


def delta_rank(ratio: float, count: int, outputs: int, inputs: int) -> int:
    """The rank of each delta so that a base and `count` deltas hold `ratio` of the parameters of `count` matrices.

    Raises:
        UsageError: the base alone takes more.
    """
    budget = ratio * count * outputs * inputs - outputs * inputs
    if budget < count * (outputs + inputs):
        least = (outputs * inputs + count * (outputs + inputs)) / (count * outputs * inputs)
        raise UsageError(
            f"ratio {ratio:g} is too small for a base that {count} experts share",
            hint=f"the base and deltas of rank 1 take {least:.3f} of the parameters; use base=none for less",
        )
    return rank_for_parameters(budget / count, outputs, inputs)
