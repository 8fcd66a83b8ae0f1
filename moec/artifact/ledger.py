"""The ledger: one line per pass that says what the pass claims, what was measured, and what it did to the model."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from moec.record import Record

LOSS_DIGITS = 4
"""Decimals of a change of the loss, which do not depend on the order in which a kernel sums."""


class ModelSize(Record):
    """The size of a model at one point of the pipeline."""

    parameters: int = Field(ge=0)
    """Elements of all weights, each stored weight counted once."""

    bytes: int = Field(ge=0)
    """Bytes of all weights in the data types that the module holds them in."""

    active_flops: int = Field(ge=0)
    """Floating-point operations of the matrix products per token (2 per multiplication), routed experts only."""

    operations: int = Field(ge=0)
    """Operations in the module, nested ones included."""


class CheckOutcome(StrEnum):
    """What comparing the model before and after a pass gave."""

    UNCHANGED = "unchanged"  # the printed module and all weights are the same
    WITHIN_BOUND = "within bound"  # claimed exact, and the relative error is below the bound
    MEASURED = "measured"  # claimed lossy, and the error is in `layer_errors`
    NOT_CHECKED = "not checked"  # --check none


class LayerError(Record):
    """What a lossy pass did to one layer, on the same hidden states before and after; errors have four digits.

    `relative_error` is that of what the layer gives, `expert_error` the largest one of a token that was sent to an
    expert, and `worst_expert` the router output of that expert; None where no expert could be compared.
    `router_differences` are the tokens that the router sends to other experts without a tie.
    """

    layer: str
    relative_error: float = Field(ge=0)
    expert_error: float | None = Field(default=None, ge=0)
    worst_expert: int | None = Field(default=None, ge=0)
    router_differences: int = Field(default=0, ge=0)


class LedgerEntry(Record):
    """One line of the ledger. It holds nothing that varies from run to run: times are in measurements.json."""

    pass_text: str
    """The pass and its options as pipeline text."""

    claim: str
    """`exact` or `lossy`."""

    outcome: CheckOutcome
    layer_errors: tuple[LayerError, ...]
    before: ModelSize
    after: ModelSize
    seed: int
    loss_change: float | None = None
    """Nats per token that it adds on the tokens of the check, with four decimals; None where the model gives no logits,
    or nothing was measured."""


def round_error(value: float) -> float:
    """`value` to four significant digits, which do not depend on the number of threads that computed it."""
    return float(f"{value:.4g}")
