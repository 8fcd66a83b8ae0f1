"""What can become of an expert, and which of its neurons or ranks stay."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ActionKind(Enum):
    """`keep`, `narrow`, `quantize`, `factor` and `delta` experts are stored; the others leave a vector, or nothing."""

    KEEP = "keep"  # as it is
    NARROW = "narrow"  # some of its neurons
    QUANTIZE = "quantize"  # its matrices as codes of few bits
    FACTOR = "factor"  # its matrices as products of thin ones
    DELTA = "delta"  # a mean that the layer shares, and what it is beyond that as products of thin ones
    CONSTANT = "constant"  # its mean output
    ZERO = "zero"  # nothing: its router outputs name no expert
    REDIRECT = "redirect"  # another expert of the layer answers for it

    @property
    def is_stored(self) -> bool:
        """Whether the expert still computes something of its own."""
        return self not in (ActionKind.CONSTANT, ActionKind.ZERO, ActionKind.REDIRECT)


@dataclass(frozen=True)
class Action:
    """`size`: neurons of `narrow`, the rank of `factor` and `delta`, the stored expert that `redirect` leads to.

    `bits` of the codes of `quantize`, and `down_bits` of those of its last matrix; `narrow` experts may have some, too,
    0 for numbers.
    """

    kind: ActionKind
    size: int = 0
    bits: int = 0
    down_bits: int = 0


@dataclass(frozen=True)
class Offer:
    """An action with its price. `bytes` are those of the artifact, `flops` per token of the text on average.

    `distortion` is in the unit of the table. `neurons`: which neurons stay, in ascending order; empty but for `narrow`.
    Where it is an estimate, `sure` is the part of it that does not come from codes.
    """

    action: Action
    bytes: int
    flops: float
    distortion: float
    neurons: tuple[int, ...] = ()
    sure: float | None = None
