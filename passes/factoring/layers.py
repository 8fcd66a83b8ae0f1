"""What passes that factor the experts of a layer have in common."""

from __future__ import annotations

from collections.abc import Callable

from moec.experts import (
    Expert,
    FeedForward,
    MoeLayer,
    UnreadableExpertError,
    find_moe_layers,
    find_unreadable,
    load_expert,
)
from moec.ir import Operation
from moec.passes.factoring.sides import Norms
from moec.pipeline.base import PassContext


def factor_layers(op: Operation, context: PassContext, pass_name: str, factor: Callable[[MoeLayer], None]) -> None:
    """Factors one layer after the other; what cannot be read is refused with its reason."""
    for unreadable in find_unreadable(op):
        context.refuse(unreadable.op, unreadable.reason, pass_name)
    for layer in find_moe_layers(op):
        context.require_weights()  # asked for before statistics, which text alone cannot have either
        try:
            factor(layer)
        except UnreadableExpertError as error:
            context.refuse(layer.experts, error.message, pass_name)


class FactoredLayer:
    """One layer while it is factored."""

    def __init__(self, layer: MoeLayer, context: PassContext, norms: Norms) -> None:
        self.layer = layer
        self.context = context
        self.weights = context.require_weights()
        self.norms = norms

    def load(self, number: int) -> Expert:
        """A stored expert as it is."""
        return load_expert(self.layer, self.weights, number)

    def feed_forward(self, number: int) -> FeedForward:
        """A stored expert that is known to be a feed-forward block."""
        expert = self.load(number)
        assert isinstance(expert, FeedForward)
        return expert

    def free(self) -> list[int]:
        """The stored feed-forward blocks that may change."""
        numbers = [number for number in range(self.layer.expert_count) if number not in self.layer.protected]
        return [number for number in numbers if isinstance(self.load(number), FeedForward)]

    def name_starved(self, op: Operation, what: str) -> None:
        """A remark on the experts without tokens, and what they got instead."""
        if self.norms.starved:
            names = ", ".join(map(str, sorted(self.norms.starved)))
            self.context.remark(op, f"no token of the calibration text chose the experts {names}: {what}")
