"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.operation import Block, Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, register_pass


@register_pass("dce")
@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Erases pure operations whose results nobody reads, in nested regions too.

    Arguments stay, used or not: those of a function are its interface, and the body of an expert has one argument for
    each of its stacks.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    erased = Statistic("operations erased, those in regions of erased operations included")

    def run(self, op: Operation, context: PassContext) -> None:
        for region in op.regions:
            context.count(self.erased, _sweep(region.block))


def _sweep(block: Block) -> int:
    """Erases from the end, so that one walk finds whole dead chains."""
    erased = 0
    for op in reversed(block):
        if op.pure and not op.has_uses:
            erased += sum(1 for _ in op.walk())
            op.erase()
        else:
            erased += sum(_sweep(region.block) for region in op.regions)
    return erased
