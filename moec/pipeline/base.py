"""What a pass is: a frozen dataclass whose fields are the options, registered by a decorator.

    @register_pass("drop-views")
    @dataclass(frozen=True)
    class DropViews(Pass):
        \"\"\"Removes views that do not change the shape.\"\"\"

        claim: ClassVar[Claim] = Claim.EXACT
        removed = Statistic("views removed")
        limit: int = option("at most so many", 100)

        def run(self, op: Operation, context: PassContext) -> None:
            ...
            context.count(self.removed)

A pass changes the operation in place. It may keep nothing between runs: what it finds goes to its context.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from moec.errors import MoecError, UsageError
from moec.ir.location import Location
from moec.ir.operation import Operation
from moec.rewrite.greedy import RewriteResult, apply_patterns
from moec.rewrite.pattern import Refusal, RewritePattern

if TYPE_CHECKING:
    from pathlib import Path

    from moec.calibration.calibration import Calibration
    from moec.frontend.other_sources import OtherSource
    from moec.module import Module
    from moec.weights.context import WeightContext

T = TypeVar("T")
PassT = TypeVar("PassT", bound="type[Pass]")


class Claim(Enum):
    """What a pass promises: the function is preserved, or it changes and the change is measured."""

    EXACT = "exact"
    LOSSY = "lossy"


class Statistic:
    """A counter of a pass, declared on its class: `erased = Statistic("operations erased")`.

    The numbers live in the context of a run: `context.count(self.erased)`.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.name = ""
        self.pass_class: type[Any] = object

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name.replace("_", "-")
        self.pass_class = owner


@dataclass(frozen=True)
class Remark:
    """Something that a pass says about an operation."""

    operation: str
    location: Location
    text: str

    def __str__(self) -> str:
        return f"{self.location}: {self.operation}: {self.text}"


@dataclass
class PassContext:
    """What a pass works with besides the IR, and where it leaves its findings.

    `weights` loads tensors (None where a module of text alone is transformed), `module` is the model with its source
    facts, `seed` makes random choices repeatable, `calibration_file` is what to calibrate on where a pass names
    nothing. `statistics` holds the counters by name, `refusals` and `remarks` are for people; `warnings` are remarks
    that commands show unasked.
    """

    weights: WeightContext | None = None
    module: Module | None = None
    seed: int = 0
    calibration_file: Path | None = None
    statistics: dict[str, int] = dataclasses.field(default_factory=dict)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    warnings: list[Remark] = dataclasses.field(default_factory=list)

    def count(self, statistic: Statistic, number: int = 1) -> None:
        """Adds to a counter of the pass."""
        self.statistics[statistic.name] = self.statistics.get(statistic.name, 0) + number

    def remark(self, op: Operation, text: str) -> None:
        """Tells people something about an operation."""
        self.remarks.append(Remark(op.name, op.location, text))

    def warn(self, op: Operation, text: str) -> None:
        """As `remark`, for what makes the result worse than it could be."""
        self.remark(op, text)
        self.warnings.append(self.remarks[-1])

    def refuse(self, op: Operation, reason: str, pattern: str = "") -> None:
        """Records why an operation was left as it is; `--explain` shows it."""
        self.refusals.append(Refusal(pattern, op.name, op.location, reason))

    def rewrite(self, op: Operation, patterns: Sequence[RewritePattern], *, max_iterations: int = 10) -> RewriteResult:
        """Applies patterns inside `op` and keeps their refusals.

        Raises:
            RewriteError: the patterns do not come to an end.
        """
        result = apply_patterns(op, patterns, max_iterations=max_iterations)
        self.refusals.extend(result.refusals)
        result.require_convergence()
        return result

    def require_weights(self) -> WeightContext:
        """The weights; raises MoecError where the IR came without them."""
        if self.weights is None:
            raise MoecError(
                "this pass reads weights, but the IR was given as text alone",
                hint="name the model with --source, or run the pass through `moec compile`",
            )
        return self.weights

    def require_others(self) -> tuple[OtherSource, ...]:
        """The models beside the first one; raises UsageError where there are none."""
        if self.module is None or not self.module.others:
            raise UsageError(
                "this pass joins several models, but there is only one", hint="name the others, each with --with FOLDER"
            )
        return self.module.others

    def require_calibration(self) -> Calibration:
        """What `calibrate` found; raises UsageError where it did not run."""
        if self.module is None or self.module.calibration is None:
            raise UsageError(
                "this pass needs statistics, but the model was not calibrated", hint="put calibrate in front of it"
            )
        return self.module.calibration


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Dataclass fields are the options; the docstring's first line is the summary.

    `anchor` names the operation that the pass runs on: `builtin.module`, `func.func`, or "" for either. `layerwise`:
    what layers give to each other keeps its meaning, so that the ledger may compare them one by one.
    """

    pass_name: ClassVar[str] = ""
    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = ""
    layerwise: ClassVar[bool] = True

    def promise(self) -> Claim:
        """What a run with these options is held to: `claim`, unless they decide."""
        return self.claim

    def run(self, op: Operation, context: PassContext) -> None:
        """Transforms `op` in place; raises MoecError where it cannot."""
        raise NotImplementedError(f"{type(self).__name__} has no run method")

    @classmethod
    def summary(cls) -> str:
        """The first line of the class's docstring."""
        return cls.description().partition("\n")[0]

    @classmethod
    def description(cls) -> str:
        """The class's docstring; empty where it has none of its own."""
        return inspect.cleandoc(cls.__doc__) if "__doc__" in vars(cls) and cls.__doc__ and not _generated(cls) else ""

    @classmethod
    def statistic_list(cls) -> list[Statistic]:
        """The counters that the class and its bases declare."""
        found: dict[str, Statistic] = {}
        for base in reversed(cls.__mro__):
            found.update({value.name: value for value in vars(base).values() if isinstance(value, Statistic)})
        return list(found.values())


def _generated(cls: type[Any]) -> bool:
    """Whether dataclass itself wrote the docstring, `Name(field: int = 1)`."""
    return (cls.__doc__ or "").startswith(f"{cls.__name__}(")


@overload
def option(help_text: str) -> Any: ...
@overload
def option(help_text: str, default: T) -> T: ...
def option(help_text: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with a line of help; without a default the option must be given."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def register_pass(name: str) -> Callable[[PassT], PassT]:
    """Registers a pass class under `name`. The class is a frozen dataclass; the decorator stands above `@dataclass`."""

    def register(cls: PassT) -> PassT:
        from moec.pipeline.registry import remember_class

        cls.pass_name = name
        remember_class(name, cls)
        return cls

    return register
