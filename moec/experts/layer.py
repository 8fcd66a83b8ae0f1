"""The layers with experts of a module: the route, the experts, and the linear map that makes the router's logits."""

from __future__ import annotations

from dataclasses import dataclass

from moec.dialects.aten import AtenOp
from moec.dialects.moe import ExpertsOp, ReplicaOp, RouteOp
from moec.ir import Operation, TensorType, Value

# what may lie between the router's linear map and the route: it changes neither values nor the axis of the experts
_PASSING = frozenset({"aten.view.default", "aten._to_copy.default", "aten.clone.default", "aten.alias.default"})


@dataclass(frozen=True)
class MoeLayer:
    """One `moe.experts` with the `moe.route` and the router in front of it. An edit returns a new one.

    `name` is unique in the module (`model.layers.3.mlp.experts`), `index` counts the module's layers with experts.
    `router` is `aten.linear.default` of rows [T, H] and a weight [R, H]; R router outputs name stored experts through
    `stored`.
    """

    name: str
    index: int
    route: RouteOp
    experts: ExpertsOp
    router: AtenOp

    @property
    def outputs(self) -> int:
        """R, the router's outputs."""
        return self.route.experts

    @property
    def expert_count(self) -> int:
        """E, the stored experts."""
        return self.experts.expert_count

    @property
    def hidden_size(self) -> int:
        """H."""
        size = _shape(self.experts.x)[1]
        assert isinstance(size, int)
        return size

    @property
    def top_k(self) -> int:
        """K, slots per token."""
        size = _shape(self.experts.ids)[1]
        assert isinstance(size, int)
        return size

    @property
    def stored(self) -> tuple[int, ...]:
        """For each router output its stored expert, -1 for none."""
        stored: tuple[int, ...] = self.experts.stored
        return stored

    @property
    def protected(self) -> frozenset[int]:
        """Stored experts that must stay as they are."""
        return frozenset(self.experts.protected)

    def outputs_of(self, expert: int) -> tuple[int, ...]:
        """The router outputs that name a stored expert."""
        return tuple(output for output, target in enumerate(self.stored) if target == expert)


@dataclass(frozen=True)
class Unreadable:
    """A layer with experts that passes leave alone, and why."""

    op: ExpertsOp
    reason: str


def find_moe_layers(root: Operation) -> tuple[MoeLayer, ...]:
    """The layers of a module in order, without those that `find_unreadable` names."""
    return tuple(layer for layer in _read(root) if isinstance(layer, MoeLayer))


def find_unreadable(root: Operation) -> tuple[Unreadable, ...]:
    """The layers whose ids and gates are not those of a `moe.route` behind a linear router."""
    return tuple(layer for layer in _read(root) if isinstance(layer, Unreadable))


def _read(root: Operation) -> list[MoeLayer | Unreadable]:
    found: list[MoeLayer | Unreadable] = []
    names: dict[str, int] = {}
    for op in root.walk():
        if not isinstance(op, ExpertsOp):
            continue
        name = op.location.name or "experts"
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        index = sum(isinstance(layer, MoeLayer) for layer in found)
        found.append(_layer(op, name, index))
    return found


def _layer(op: ExpertsOp, name: str, index: int) -> MoeLayer | Unreadable:
    route = op.ids.defining_op
    if isinstance(route, ReplicaOp):
        return Unreadable(
            op, "its experts have replicas, and which of them a token reads is decided for them as they are"
        )
    if not isinstance(route, RouteOp) or op.ids is not route.ids:
        return Unreadable(op, "its experts are chosen by arithmetic that is no moe.route")
    if op.gates is not route.gates:
        return Unreadable(op, "the gates of its route reach the experts through other arithmetic")
    router = router_of(route)
    if router is None:
        return Unreadable(op, "its router is not one linear map of the hidden states")
    return MoeLayer(name, index, route, op, router)


def router_of(route: RouteOp) -> AtenOp | None:
    """The `aten.linear.default` that makes the logits, None where they come from something else."""
    value: Value = route.logits
    while True:
        op = value.defining_op
        if not isinstance(op, AtenOp):
            return None
        if op.name == "aten.linear.default":
            return op
        if op.name not in _PASSING or not value.has_one_use or _shape(op.operands[0])[-1] != _shape(value)[-1]:
            return None
        value = op.operands[0]


def _shape(value: Value) -> tuple[object, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.shape
