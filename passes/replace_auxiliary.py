"""Light modules in the place of the experts that a token ranks low."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer, UnreadableExpertError, find_moe_layers, find_unreadable, load_expert
from moec.ir import Operation
from moec.passes.auxiliary_experts.fitting import AuxiliaryRows, Base, Fitted, ModuleForm, ModuleKind
from moec.passes.auxiliary_experts.rewriting import split_layer
from moec.passes.factoring.sides import parameters
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class BaseChoice(Enum):
    """`Base`, or in each layer that of the smaller error on the calibration text."""

    SKIP = "skip"
    RENORM = "renorm"
    AUTO = "auto"


@register_pass("replace-auxiliary")
@dataclass(frozen=True)
class ReplaceAuxiliary(Pass):
    """Runs only the best-ranked experts of a token in full, and light modules in the place of the others.

    After Compressed Experts (arXiv 2503.00634), without training: the module of an expert is an affine map of low rank,
    or a constant, fitted on the tokens that rank the expert below the first `main`, errors times the gate. With
    base=renorm the gates of the main experts are scaled to the sum of all of the token's gates, and modules are fitted
    to what is still missing. An expert that too few such tokens chose gets the module that fits all experts' tokens.

    A token multiplies with fewer numbers; the experts are stored as before, and the modules beside them. Protected
    experts run in full at every rank. The pass goes last: what follows would take the main experts for the whole layer.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    replaced = Statistic("modules in the place of experts")
    pooled = Statistic("modules fitted on the tokens of all experts, for want of their own")
    before = Statistic("parameters of experts that a token multiplies with, before")
    after = Statistic("parameters of experts that a token multiplies with, after")

    main: int = option("experts of a token that run in full")
    module: ModuleKind = option("what stands in the place of an expert", ModuleKind.AFFINE)
    rank: int = option("rank of an affine module", 8)
    base: BaseChoice = option(
        "gates of the main experts: their own, scaled to the sum of all, or the better one", BaseChoice.AUTO
    )
    coverage: int = option("fewest tokens that a module of an expert's own is fitted on", 16)

    def __post_init__(self) -> None:
        for name in ("main", "rank", "coverage"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")

    def run(self, op: Operation, context: PassContext) -> None:
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        for layer in find_moe_layers(op):
            try:
                self._replace(layer, context)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)

    def _replace(self, layer: MoeLayer, context: PassContext) -> None:
        if self.main >= layer.top_k:
            raise UsageError(
                f"main {self.main} leaves no auxiliary experts: a token has {layer.top_k}",
                where=layer.name,
                hint=f"give at most {layer.top_k - 1}" if layer.top_k > 1 else "leave this pass out",
            )
        weights = context.require_weights()
        self._check_size(layer, context)
        if layer.protected and self.base is BaseChoice.RENORM:
            context.refuse(layer.experts, "scaled gates would change what its protected experts give", self.pass_name)
            return
        sample = context.require_calibration().sample(layer)
        slots = AuxiliaryRows(layer, sample, weights, self.main)
        form = ModuleForm(self.module, self.rank, self.coverage)
        fits = [slots.fit(base, form) for base in self._bases(layer)]
        best = min(fits, key=lambda fit: fit.error)
        before, after = slots.active_parameters(best.modules)
        context.count(self.replaced, len(best.modules))
        context.count(self.before, round(before))
        context.count(self.after, round(after))
        starved = slots.starved(form) if self.module is not ModuleKind.NONE else []
        context.count(self.pooled, len(starved))
        summary = self._summary(layer, fits, best, slots.energy(), after / before if before else 1.0)
        first = split_layer(layer, weights, self.main, best.base, best.modules)
        context.remark(first, summary)
        if starved:
            names = ", ".join(map(str, starved))
            context.remark(first, f"too few tokens rank the experts {names} low: their module is that of all experts")

    def _bases(self, layer: MoeLayer) -> list[Base]:
        if self.base is BaseChoice.AUTO:
            return [Base.SKIP] if layer.protected else list(Base)
        return [Base(self.base.value)]

    def _check_size(self, layer: MoeLayer, context: PassContext) -> None:
        """Raises UsageError where a module would be no lighter than an expert."""
        if self.module is not ModuleKind.AFFINE:
            return
        size = 2 * self.rank * layer.hidden_size
        for number in range(layer.expert_count):
            expert = load_expert(layer, context.require_weights(), number)
            if isinstance(expert, FeedForward) and size >= parameters(expert, shared=True):
                raise UsageError(
                    f"a module of rank {self.rank} is no smaller than the expert {number}",
                    where=layer.name,
                    hint=f"give a rank below {parameters(expert, shared=True) // (2 * layer.hidden_size)}",
                )

    def _summary(self, layer: MoeLayer, fits: list[Fitted], best: Fitted, energy: float, share: float) -> str:
        errors = " and ".join(f"{fit.error / energy if energy else 0.0:.2%} with base={fit.base.value}" for fit in fits)
        return (
            f"{self.main} of {layer.top_k} experts of a token run in full, base={best.base.value}; a token multiplies "
            f"with {share:.0%} of the parameters; the output's squared error on the calibration text is {errors}"
        )
