"""What the matrices of experts read on the calibration text, under a policy for experts that few tokens chose."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moec.calibration.sample import LayerSample, spread_rows
from moec.experts import MoeLayer


class Policy(Enum):
    """The rows of the sample that count for an expert, and their weights.

    ROUTED: those that chose it, alike. AFFINITY: those, by their gates (MoEQuant). ALL: every row. BALANCED: those that
    chose it, and as many more as its router output rates highest as an expert has on average (EAQuant). AUTO: those
    that chose it, alike, and every row with a weight that matters where they are few.
    """

    ROUTED = "routed"
    AFFINITY = "affinity"
    ALL = "all"
    BALANCED = "balanced"
    AUTO = "auto"
    OUTPUT = "output"


PRIOR_ROWS = 32.0
"""AUTO and OUTPUT: all rows of the sample together weigh as much as so many rows that chose the expert."""


def second_moment(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of w x x^T, float64 [K, K], over rows [n, K]."""
    weighted = rows.double() if weights is None else rows.double() * weights.sqrt()[:, None]
    return weighted.T @ weighted


@dataclass(frozen=True)
class ExpertInputs:
    """The inputs of a layer's experts; `layer` is the one whose router chooses.

    AUTO and OUTPUT let at most so many `others` stand for all rows of the sample; None for all of them.
    """

    layer: MoeLayer
    sample: LayerSample
    policy: Policy
    others: int | None = None

    def rows(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows float32 [n, H], weights float64 [n]) of a stored expert."""
        chosen, gates = self.sample.chosen(self.layer, number)
        count = len(self.sample)
        match self.policy:
            case Policy.ROUTED:
                indices, weights = chosen, torch.ones(len(chosen), dtype=torch.float64)
            case Policy.AFFINITY:
                indices, weights = chosen, gates.abs()
            case Policy.ALL:
                indices, weights = torch.arange(count), torch.ones(count, dtype=torch.float64)
            case Policy.BALANCED:
                indices = torch.cat([chosen, self._next_best(number, chosen)])
                weights = torch.ones(len(indices), dtype=torch.float64)
            case Policy.AUTO | Policy.OUTPUT:
                others = spread_rows(count, count if self.others is None else self.others)
                weights = torch.zeros(count, dtype=torch.float64)
                weights[others] = PRIOR_ROWS / max(len(others), 1)
                squares = gates.square() if self.policy is Policy.OUTPUT else torch.ones_like(gates)
                weights[chosen] += squares / squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
                indices = weights.nonzero()[:, 0]
                weights = weights[indices]
        return self.sample.x[indices].float(), weights

    def _next_best(self, number: int, chosen: torch.Tensor) -> torch.Tensor:
        """Rows that did not choose the expert, by the logit of its best router output, up to the mean count."""
        run = self.sample.route(self.layer)
        outputs = self.layer.outputs_of(number)
        mean = int((run.stored_ids >= 0).sum()) / max(self.layer.expert_count, 1)
        missing = int(mean) - len(chosen)
        if missing <= 0 or not outputs:
            return torch.empty(0, dtype=torch.int64)
        scores = run.logits[:, list(outputs)].amax(1).double()
        scores[chosen] = -torch.inf
        order = scores.sort(descending=True, stable=True).indices
        return order[: min(missing, len(order) - len(chosen))]
