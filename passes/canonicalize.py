"""Canonicalization: one form for what can be said in several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.operation import Operation
from moec.passes.canonical_forms import aten, moe
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

PATTERNS = (*aten.PATTERNS, *moe.PATTERNS)


@register_pass("canonicalize")
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Brings operations into one canonical form and erases what becomes dead.

    1. aten: operations that only move or copy memory, casts and shape changes to the same type, arithmetic with a
       neutral element; chains of shape changes, broadcasts, permutations, slices and lossless casts become one.
    2. moe: stages of `moe.route` that do nothing are set to their defaults, and of several exact spellings of one
       routing one stays.

    The patterns of each dialect are in `passes/canonical_forms/`. None reads a weight or a constant.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    rewritten = Statistic("pattern applications")
    erased = Statistic("dead operations erased")
    max_iterations: int = option("rewrites allowed for each operation before the patterns count as endless", 10)

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise ValueError("max-iterations must be at least 1")

    def run(self, op: Operation, context: PassContext) -> None:
        result = context.rewrite(op, PATTERNS, max_iterations=self.max_iterations)
        context.count(self.rewritten, sum(result.changed.values()))
        context.count(self.erased, result.erased)
