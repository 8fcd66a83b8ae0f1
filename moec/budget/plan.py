"""The outcome as a file for people and for `apply-plan`: what becomes of each expert, and what it should cost."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from moec.budget.actions import ActionKind
from moec.budget.measure import Distortion
from moec.budget.sizes import format_size
from moec.errors import UsageError
from moec.record import Record, read_record, write_record

SCHEMA: Literal["moec.plan/1"] = "moec.plan/1"


class ExpertPlan(Record):
    """One stored expert. `size`, bits and `neurons` as in `Action` and `Offer`; `distortion` is its share of the
    plan's."""

    expert: int = Field(ge=0)
    action: ActionKind
    size: int = 0
    bits: int = Field(default=0, ge=0, le=8)
    down_bits: int = Field(default=0, ge=0, le=8)
    bytes: int = Field(ge=0)
    distortion: float = Field(ge=0)
    neurons: tuple[int, ...] = ()


class LayerPlan(Record):
    """One layer by its name, with all of its stored experts. `base_bytes` are those of the mean of `delta` experts."""

    layer: str
    base_bytes: int = 0
    experts: tuple[ExpertPlan, ...]


class BudgetPlan(Record):
    """A plan for all experts of a module.

    Bytes are those of experts in an artifact of type `dtype`. `predicted` is the sum of distortions, in nats per token
    where `measure` knows gradients; no plan has less than `bound`, of offers of codes those that were made. `flops` are
    those of experts, per token on average.
    Codes have scales for `group` inputs; with `refit` last products are fitted before they become codes.
    """

    schema_name: Literal["moec.plan/1"] = Field(default=SCHEMA, alias="schema")
    measure: str
    solver: str
    dtype: str
    group: int = Field(default=32, ge=1)
    refit: bool = False
    budget_bytes: int
    bytes: int
    source_bytes: int
    budget_flops: float | None
    flops: float
    source_flops: float
    predicted: float
    bound: float
    gap: float
    layers: tuple[LayerPlan, ...]

    def counts(self) -> dict[ActionKind, int]:
        """How many experts meet each end."""
        actions = [expert.action for layer in self.layers for expert in layer.experts]
        return {kind: actions.count(kind) for kind in ActionKind if kind in actions}

    def description(self) -> str:
        """Bytes, the predicted loss and how far from the best it may be, in one line."""
        unit = "squared error" if self.measure == Distortion.MSE.value else "nats per token"
        return (
            f"experts take {format_size(self.bytes)} of {format_size(self.source_bytes)} "
            f"({self.bytes / max(self.source_bytes, 1):.1%}), predicted loss +{self.predicted:.4g} {unit}, "
            f"bound {self.bound:.4g}, gap {self.gap:.2%} ({self.solver})"
        )


def write_plan(path: Path, plan: BudgetPlan) -> None:
    """Writes a plan as JSON. Raises UsageError where there is no such folder."""
    try:
        write_record(path, plan)
    except OSError as error:
        raise UsageError(f"the plan cannot be written: {error.strerror}", where=str(path)) from None


def read_plan(path: Path) -> BudgetPlan:
    """Reads a plan. Raises UsageError for a missing file, UnsafeInputError for a malformed one."""
    if not path.is_file():
        raise UsageError("there is no such plan", where=str(path), hint="solve-budget{file=...} writes one")
    return read_record(path, BudgetPlan)
