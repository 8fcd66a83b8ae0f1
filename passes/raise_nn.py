"""Raising of aten arithmetic to the nn dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Operation
from moec.passes.nn_patterns import (
    ACTIVATION_PATTERNS,
    ATTENTION_PATTERNS,
    MLP_PATTERNS,
    NORM_PATTERNS,
    ROTARY_PATTERNS,
)
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, register_pass


@register_pass("raise-nn")
@dataclass(frozen=True)
class RaiseNN(Pass):
    """Recognises norms, rotary embeddings, attention and feed-forward blocks in aten arithmetic.

    What is raised computes the same up to rounding; what looks like one of them but is not says why (`--explain`).
    """

    claim: ClassVar[Claim] = Claim.EXACT
    norms = Statistic("norms recognised")
    rotary = Statistic("rotary embeddings recognised")
    attention = Statistic("attentions recognised")
    mlps = Statistic("feed-forward blocks recognised")

    def run(self, op: Operation, context: PassContext) -> None:
        before = _counts(op)
        # Feed-forward blocks come last: their bodies then hold norms that are already raised.
        context.rewrite(op, [*NORM_PATTERNS, *ROTARY_PATTERNS, *ATTENTION_PATTERNS, *ACTIVATION_PATTERNS])
        context.rewrite(op, MLP_PATTERNS)
        after = _counts(op)
        for statistic, kinds in (
            (self.norms, ("nn.rms_norm", "nn.layer_norm")),
            (self.rotary, ("nn.rotary",)),
            (self.attention, ("nn.attention",)),
            (self.mlps, ("nn.mlp",)),
        ):
            context.count(statistic, sum(after.get(kind, 0) - before.get(kind, 0) for kind in kinds))


def _counts(op: Operation) -> dict[str, int]:
    found: dict[str, int] = {}
    for nested in op.walk():
        found[nested.name] = found.get(nested.name, 0) + 1
    return found
