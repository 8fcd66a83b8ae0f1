"""A few gradient steps on a sparse model, beside the same steps on its source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moec.calibration.data import IDS_SUFFIXES, read_data
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import MLPOp
from moec.dialects.quant import DequantOp
from moec.errors import UsageError
from moec.experts import find_moe_layers
from moec.experts.parts import store_tensor
from moec.experts.router_source import is_frozen, router_weights
from moec.ir import DType, Operation, TensorType
from moec.module import Module
from moec.passes.norm_folding.linear_maps import source_of
from moec.passes.routing.training import Outcome, Schedule, teacher_of, train
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_MILLIONTHS = 1_000_000
_HELD_OUT_SHARE = 8


class Trained(Enum):
    """Which weights change."""

    ROUTER = "router"  # the routers, but for frozen ones
    ROUTED = "routed"  # the routers, the experts, and the dense feed-forward blocks
    ALL = "all"  # every floating-point weight but frozen routers
    SCALES = "scales"  # the scales of packed weights, whose codes and zero points stay (EfficientQAT, end to end)


class Target(Enum):
    """What is learned from."""

    TEXT = "text"  # the next token
    SOURCE = "source"  # the distribution of the source model


@register_pass("tune")
@dataclass(frozen=True)
class Tune(Pass):
    """Trains routers, or experts too, on text for some steps, and the source model as long for comparison.

    1. Windows of the calibration text are learned from; the last eighth of each text is held out. The weights with the
       least held-out loss of the next token count, those from before included, so nothing gets worse there.
    2. Gates that are one have no derivative; while it trains they are p / p for the router's softmax scores p, where
       the divisor counts as a constant. `balance` adds the Switch loss of every layer.
    3. `target=source` learns the source's distribution, which brings back what choosing experts cost and little else.
       `target=text` learns the next token and may forget what the text does not have: with 75,000 tokens a small model
       became worse on other passages. It is for experts that are to differ from the source, as copies and several
       models.
    4. The source, read again from its folder, has as many steps on the same windows in the same order, on its own
       feed-forward blocks and experts (`train=routed`), on all weights, or on nothing where only routers are trained,
       or where it would learn from itself. A gain counts against that: statistics and a remark give all four losses,
       and the share of the gap to the tuned source that was closed.
    5. All weights that are trained, and three times as much for the steps, are in memory in float32.

    Only decoders are trained. `train=all` may cost a large model more memory than it has; `router` needs little.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    changed = Statistic("weights that were trained")
    loss_before = Statistic("held-out loss before, in millionths of a nat per token")
    loss_after = Statistic("held-out loss after, in millionths of a nat per token")
    source_before = Statistic("held-out loss of the source before, in millionths of a nat per token")
    source_after = Statistic("held-out loss of the source after as many steps, in millionths of a nat per token")
    train: Trained = option("which weights", Trained.ROUTED)
    target: Target = option("what is learned from", Target.SOURCE)
    steps: int = option("gradient steps", 120)
    batch: int = option("windows in one step", 16)
    rate: float = option("step size of Adam; it falls linearly to a tenth", 1e-3)
    balance: float = option("weight of the loss that spreads tokens over experts", 0.0)
    text: tuple[Path, ...] = option(
        "text files; without any, what --calibration names, or texts that come with moec", ()
    )
    sequences: int = option("windows to take at most", 2048)
    length: int = option("tokens of a window", 64)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.length < 2:
            raise ValueError("length must be at least 2")
        if not 0 < self.rate < 1 or self.balance < 0:
            raise ValueError("rate must be within 0 and 1, balance must not be negative")

    def run(self, op: Operation, context: PassContext) -> None:
        module = context.module
        if module is None or module.source.folder is None or module.source.kind != "decoder":
            raise UsageError(
                "only decoders from a folder can be tuned",
                hint="the source is tuned beside it, and read again for that",
            )
        assert isinstance(op, ModuleOp)
        if module.others and self.target is Target.SOURCE:
            raise UsageError("several models have no one distribution to learn", hint="tune them with target=text")
        layers = find_moe_layers(op)
        if not layers:
            raise UsageError("the model has no experts to tune", hint="put factorize or upcycle in front")
        frozen = [layer for layer in layers if is_frozen(layer)]
        for layer in frozen:
            context.refuse(layer.router, "its router is frozen", self.pass_name)
        windows, held_out = self._windows(module, context)
        schedule = Schedule(self.steps, self.batch, self.rate, self.balance, context.seed)
        source = _source(module)
        teacher = teacher_of(source.op, source.weights) if self.target is Target.SOURCE else None
        names = self._names(op)
        found = train(op, module.weights, names, windows, held_out, schedule, teacher)
        compared = self._names(source.op) if teacher is None else []
        control = train(source.op, source.weights, compared, windows, held_out, schedule, None)
        for weight in [item for item in op.walk() if isinstance(item, WeightOp) and item.weight_name in found.weights]:
            kind = weight.value.type
            assert isinstance(kind, TensorType)
            weight.source = str(store_tensor(module.weights, found.weights[weight.weight_name], kind.dtype))
        self._report(op, found, control, context)

    def _names(self, op: Operation) -> list[str]:
        """Names of the weights that are trained."""
        layers = find_moe_layers(op)
        routers = [weight for layer in layers if not is_frozen(layer) for weight in router_weights(layer)]
        frozen = {weight for layer in layers if is_frozen(layer) for weight in router_weights(layer)}
        match self.train:
            case Trained.ROUTER:
                found = routers
            case Trained.ROUTED:
                found = routers + [
                    value.defining_op
                    for item in op.walk()
                    if isinstance(item, ExpertsOp | MLPOp)
                    for value in item.weights
                    if isinstance(value.defining_op, WeightOp)
                ]
            case Trained.SCALES:
                found = [weight for weight in _scales(op) if weight not in frozen]
            case Trained.ALL:
                found = [item for item in op.walk() if isinstance(item, WeightOp) and item not in frozen]
        return list(dict.fromkeys(weight.weight_name for weight in found if _is_float(weight)))

    def _windows(self, module: Module, context: PassContext) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """(windows to learn from, windows that are held out), of equal length."""
        given = context.calibration_file
        is_ids = given is not None and given.suffix in IDS_SUFFIXES
        texts = self.text or (() if given is None or is_ids else (given,))
        data = read_data(
            module,
            texts=texts,
            tokens=given if is_ids and not self.text else None,
            sequences=self.sequences,
            length=self.length,
            seed=context.seed,
        )
        windows: list[NDArray[np.int64]] = []
        held_out: list[NDArray[np.int64]] = []
        for domain in range(len(data.domains)):
            pairs = zip(data.sequences, data.domain, strict=True)
            whole = [window for window, of in pairs if of == domain and len(window) == self.length]
            end = len(whole) - len(whole) // _HELD_OUT_SHARE
            windows += whole[:end]
            held_out += whole[end:]
        count = len(windows) + len(held_out)
        if count < 2 * _HELD_OUT_SHARE or not held_out:
            raise UsageError(
                f"the text has {count} windows of {self.length} tokens to tune on",
                where=data.name,
                hint=f"give a text of {2 * _HELD_OUT_SHARE * self.length} tokens or more",
            )
        return windows, held_out

    def _report(self, op: ModuleOp, found: Outcome, control: Outcome, context: PassContext) -> None:
        context.count(self.changed, len(found.weights))
        for statistic, loss in (
            (self.loss_before, found.before),
            (self.loss_after, found.after),
            (self.source_before, control.before),
            (self.source_after, control.after),
        ):
            context.count(statistic, round(loss * _MILLIONTHS))
        gap = found.before - control.after
        closed = f", {(found.before - found.after) / gap:.0%} of the gap to it" if gap > 0 else ""
        context.remark(
            op,
            f"held-out loss {found.before:.4f} -> {found.after:.4f} nats per token after {self.steps} steps; the "
            f"source after as many {control.before:.4f} -> {control.after:.4f}{closed}",
        )


def _source(module: Module) -> Module:
    """The model as its folder has it, raised."""
    from moec.artifact.options import RAISING_PIPELINE
    from moec.frontend.huggingface import load_huggingface
    from moec.pipeline.manager import PassManager, Pipeline

    assert module.source.folder is not None
    source = load_huggingface(module.source.folder, module.weights.store)
    PassManager(Pipeline.parse(RAISING_PIPELINE)).run(source.op, weights=source.weights, module=source)
    return source


def _scales(op: Operation) -> list[WeightOp]:
    """The weights that are scales or levels of packed matrices."""
    sources = [source_of(item.scales) for item in op.walk() if isinstance(item, DequantOp)]
    return [source.weight for source in sources if source is not None]


def _is_float(weight: WeightOp) -> bool:
    kind = weight.value.type
    return isinstance(kind, TensorType) and kind.dtype in (DType.F32, DType.F16, DType.BF16)
