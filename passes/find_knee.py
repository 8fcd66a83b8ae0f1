"""How many weights of experts a model can do without."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from moec.calibration.text_loss import text_loss
from moec.dialects.builtin import ModuleOp
from moec.experts import find_moe_layers
from moec.ir import Operation
from moec.module import Module
from moec.passes.nm_sparsify import GLOBAL, NmSparsify
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


@register_pass("find-knee")
@dataclass(frozen=True)
class FindKnee(Pass):
    """Finds how many of the smallest expert weights can be zero before the loss rises; it changes nothing.

    1. For each `step` the lowest share of all expert weights is set to zero in a copy, as `nm-sparsify{pattern=global}`
       does, and the loss of the copy on the calibration text is measured, until it is above `tolerance`.
    2. The knee is the largest share up to which the loss rose by at most `tolerance` of itself (essential sparsity,
       arXiv 2306.03805). It tells how redundant the experts are, not how small they can be made by other means.

    Each step costs one run of the model over the calibration text, and the bytes of the experts in the store.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    knee = Statistic("percent of the expert weights up to the knee")
    measured = Statistic("shares that were measured")

    step: float = option("distance of the shares that are tried", 0.1)
    tolerance: float = option("largest rise of the loss, as a share of the loss", 0.01)
    sequences: int = option("sequences of the calibration text that are read at most", 32)

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise ValueError(f"step {self.step:g} is not within 0 < step < 1")
        if self.tolerance < 0:
            raise ValueError("tolerance must not be negative")
        if self.sequences < 1:
            raise ValueError("sequences must be at least 1")

    def run(self, op: Operation, context: PassContext) -> None:
        data, module = context.require_calibration().data, context.module
        assert module is not None
        if not find_moe_layers(op):
            return
        data = dataclasses.replace(data, sequences=data.sequences[: self.sequences])
        source = text_loss(module, data)
        lines = [f"loss {source:.4f}"]
        ratio, bound = 0.0, ", the largest share that was tried"
        for number in range(1, int((1 - 1e-9) / self.step) + 1):
            share = number * self.step
            increase = text_loss(_sparse(module, share, context), data) - source
            context.count(self.measured)
            lines.append(f"{share:.0%} {increase:+.4f}")
            if increase > self.tolerance * source:
                bound = ""
                break
            ratio = share
        context.count(self.knee, round(100 * ratio))
        context.remark(
            op,
            f"{ratio:.0%} of the expert weights can be zero at {self.tolerance:.1%} of the loss{bound}: "
            f"{', '.join(lines)}",
        )


def _sparse(module: Module, ratio: float, context: PassContext) -> Module:
    """A copy with zeros."""
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    copy = dataclasses.replace(module, op=clone)
    NmSparsify(pattern=GLOBAL, ratio=ratio).run(clone, PassContext(weights=context.weights, module=copy))
    return copy
