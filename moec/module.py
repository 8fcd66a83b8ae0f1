"""A model inside moec: its IR, where its weights come from, and the facts of its source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moec.dialects.builtin import FuncOp, ModuleOp
from moec.ir import print_operation

if TYPE_CHECKING:
    from pathlib import Path

    from moec.budget.plan import BudgetPlan
    from moec.calibration.calibration import Calibration
    from moec.frontend.other_sources import OtherSource
    from moec.passes.cache_planning.simulation import CachePlan
    from moec.quantization.bit_plan import BitPlan
    from moec.weights.context import WeightContext


@dataclass(frozen=True)
class SourceFacts:
    """What is known of a source beyond its function.

    `config` is the dictionary of config.json (empty for a user's nn.Module), `folder` where it came from, `kind` is
    "decoder", "encoder" or "module", `tensors_used` of `tensors_total` checkpoint tensors are part of the function;
    `tensors_unused` says why each of the others is not.
    """

    kind: str
    model_type: str = ""
    class_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    tensors_total: int = 0
    tensors_used: int = 0
    tensors_unused: dict[str, str] = field(default_factory=dict)


@dataclass
class Module:
    """`op` is the IR (passes change it in place), `weights` loads what its weight expressions name.

    `calibration` is what the pass `calibrate` found, `plan` what `solve-budget` and `bits` what `allocate-bits`
    decided, `cache_plan` what `plan-cache` simulated, None before them. `others` are the models beside this one whose
    weights `weights` loads, too.
    """

    op: ModuleOp
    weights: WeightContext
    source: SourceFacts
    calibration: Calibration | None = None
    plan: BudgetPlan | None = None
    bits: BitPlan | None = None
    cache_plan: CachePlan | None = None
    others: tuple[OtherSource, ...] = ()

    @property
    def main(self) -> FuncOp:
        """The function that computes the model."""
        return self.op.main

    @property
    def config(self) -> dict[str, Any]:
        """The source's config.json."""
        return self.source.config

    def print(self) -> str:
        """The text form of the IR."""
        return print_operation(self.op)

    def operation_counts(self) -> dict[str, int]:
        """How many operations of each name there are, nested ones included, by falling number."""
        counts = Counter(op.name for op in self.op.walk())
        return dict(counts.most_common())

    def __str__(self) -> str:
        return self.print()

    def __repr__(self) -> str:
        inputs = ", ".join(
            f"{name}: {argument.type}" for name, argument in zip(self.main.arg_names, self.main.arguments, strict=True)
        )
        outputs = ", ".join(self.main.result_names)
        counts = self.operation_counts()
        title = self.source.class_name or self.source.kind
        return f"<moec.Module {title}({inputs}) -> {outputs}; {sum(counts.values())} operations>"

    def _repr_html_(self) -> str:
        """A table of operations for notebooks."""
        from html import escape

        rows = "".join(
            f"<tr><td style='text-align:left'><code>{escape(name)}</code></td><td>{count}</td></tr>"
            for name, count in self.operation_counts().items()
        )
        return f"<b>{escape(repr(self))}</b><table><tr><th>operation</th><th>count</th></tr>{rows}</table>"
