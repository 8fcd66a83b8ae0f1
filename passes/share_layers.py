"""Layers that share their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from moec.dialects.builtin import WeightOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.errors import UsageError
from moec.experts import find_moe_layers
from moec.ir import Operation
from moec.passes.upcycling.sources import average
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.weights.expression_parser import parse_expression

_NUMBERED = re.compile(r"((?:^|.*?\.))(\d+)(\..+)")


class Keep(Enum):
    """What each layer keeps for itself."""

    NORMS = "norms"
    NORMS_AND_ROUTERS = "norms-and-routers"


class Taken(Enum):
    """Which weights a group shares."""

    FIRST = "first"  # those of its first layer
    AVERAGE = "average"  # the mean over its layers, taken in float32 and rounded once


@register_pass("share-layers")
@dataclass(frozen=True)
class ShareLayers(Pass):
    """Lets each `group` of neighbouring layers share all weights but those of norms, as WideNet does.

    1. Weights that have the same name but for the number of their layer, and the same shape, become one: that of the
       group's first layer, or the mean over the group.
    2. An artifact stores once what several layers read. Each layer keeps its own norms, and its own router if asked.

    The function changes unless the layers were equal. WideNet (Xue et al. 2022) trains such a model from the start.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    shared = Statistic("weights that now belong to another layer, or to a mean")
    groups = Statistic("groups of layers")
    group: int = option("layers that share; 0: all of them", 0)
    keep: Keep = option("what each layer keeps for itself", Keep.NORMS)
    taken: Taken = option("which weights a group shares", Taken.FIRST)

    def __post_init__(self) -> None:
        if self.group < 0 or self.group == 1:
            raise ValueError("group must be 0 or at least 2")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        kept = self._kept(op)
        layers: dict[int, dict[str, WeightOp]] = {}
        for weight in op.walk():
            found = _NUMBERED.fullmatch(weight.weight_name) if isinstance(weight, WeightOp) else None
            if isinstance(weight, WeightOp) and found is not None and weight not in kept:
                layers.setdefault(int(found[2]), {})[found[1] + found[3]] = weight
        numbers = sorted(layers)
        if len(numbers) < 2:
            raise UsageError("there are no layers that could share weights", where=op.name)
        size = self.group or len(numbers)
        for start in range(0, len(numbers), size):
            members = [layers[number] for number in numbers[start : start + size]]
            if len(members) < 2:
                continue
            context.count(self.groups)
            for name, first in members[0].items():
                others = [member[name] for member in members[1:] if name in member]
                if any(other.value.type != first.value.type for other in others):
                    context.refuse(first, "it has another shape in other layers of its group", self.pass_name)
                    continue
                source = first.source
                if self.taken is Taken.AVERAGE:
                    parts = [parse_expression(item.source) for item in (first, *others)]
                    source = str(average(weights, parts))
                for item in (first, *others):
                    context.count(self.shared, int(item.source != source))
                    item.source = source

    def _kept(self, op: Operation) -> set[WeightOp]:
        """The weights of norms, and of routers where layers keep them."""
        readers: list[Operation] = [norm for norm in op.walk() if isinstance(norm, RMSNormOp | LayerNormOp)]
        if self.keep is Keep.NORMS_AND_ROUTERS:
            readers += [layer.router for layer in find_moe_layers(op)]
        made = {value.defining_op for reader in readers for value in reader.operands}
        return {weight for weight in made if isinstance(weight, WeightOp)}
