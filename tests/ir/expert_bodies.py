"""Kinds of experts as IR, in the form that passes leave them in, and layers that mix them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing, YieldOp
from moec.dialects.nn import TOKENS
from moec.ir import Block, DType, Region, TensorType, Value, symbol, verify
from tests.ir.build import f32

COUNT = symbol("count")
Shapes = Mapping[str, tuple[int, ...]]


class _Body:
    """Builds the body of one expert; weights are its arguments, by name."""

    def __init__(self, hidden: int, shapes: Shapes) -> None:
        self.hidden = hidden
        self.block = Block([f32(TOKENS, hidden), *[f32(*shape) for shape in shapes.values()]])
        self.rows: Value = self.block.arguments[0]
        self.weights: dict[str, Value] = dict(zip(shapes, self.block.arguments[1:], strict=True))
        self.widths = {name: shape[0] for name, shape in shapes.items()}

    def op(self, name: str, tensors: dict[str, Value], width: int, **arguments: object) -> Value:
        made = aten.build(name, tensors, (f32(TOKENS, width),), **arguments)
        self.block.append(made)
        return made.result

    def linear(self, rows: Value, weight: str, bias: str | None = None) -> Value:
        tensors = {"input": rows, "weight": self.weights[weight]}
        if bias is not None and bias in self.weights:
            tensors["bias"] = self.weights[bias]
        return self.op("linear.default", tensors, self.widths[weight])

    def projection(self, rows: Value, name: str) -> Value:
        """Whole, or as two factors, or as two factors beside a base."""
        if f"{name}_right" not in self.weights:
            return self.linear(rows, name, f"{name}_bias")
        low = self.linear(self.linear(rows, f"{name}_right"), f"{name}_left", f"{name}_bias")
        if f"{name}_base" not in self.weights:
            return low
        base = self.linear(rows, f"{name}_base")
        return self.op("add.Tensor", {"self": base, "other": low}, self.widths[f"{name}_left"])

    def swiglu(self) -> None:
        gate, up = self.projection(self.rows, "gate"), self.projection(self.rows, "up")
        width = self.widths["gate"] if "gate" in self.widths else self.widths["gate_left"]
        gate = self.op("silu.default", {"self": gate}, width)
        self.end(self.projection(self.op("mul.Tensor", {"self": gate, "other": up}, width), "down"))

    def end(self, result: Value) -> None:
        self.block.append(YieldOp([result], result_types=[]))


@dataclass(frozen=True)
class Kind:
    """A class of experts to be: its body, the shapes of an expert's own weights, and of those that all share."""

    name: str
    body: Region
    own: Shapes
    shared: Shapes


def _kind(name: str, hidden: int, own: Shapes, shared: Shapes | None = None) -> Kind:
    body = _Body(hidden, {**own, **(shared or {})})
    body.swiglu()
    return Kind(name, Region(body.block), own, shared or {})


def dense(hidden: int, width: int, *, bias: bool = False, name: str = "dense") -> Kind:
    """SwiGLU of three whole matrices."""
    own: dict[str, tuple[int, ...]] = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    if bias:
        own.update(gate_bias=(width,), up_bias=(width,), down_bias=(hidden,))
    return _kind(name, hidden, own)


def low_rank(hidden: int, width: int, rank: int, *, base: bool = False, name: str = "low_rank") -> Kind:
    """SwiGLU whose matrices are left @ right, plus, with `base`, a matrix that all experts share."""
    own: dict[str, tuple[int, ...]] = {}
    shared: dict[str, tuple[int, ...]] = {}
    for matrix, (rows, columns) in {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}.items():
        own.update({f"{matrix}_left": (rows, rank), f"{matrix}_right": (rank, columns)})
        if base:
            shared[f"{matrix}_base"] = (rows, columns)
    return _kind(name, hidden, own, shared)


def latent(hidden: int, width: int, rank: int, *, name: str = "latent") -> Kind:
    """SwiGLU that reads and writes a space of `rank` dimensions which the experts share."""
    own = {"gate_left": (width, rank), "up_left": (width, rank), "down_right": (rank, width)}
    shared = {"gate_right": (rank, hidden), "up_right": (rank, hidden), "down_left": (hidden, rank)}
    return _kind(name, hidden, own, shared)


def constant(hidden: int, *, name: str = "constant") -> Kind:
    """One vector, whatever the token."""
    body = _Body(hidden, {"value": (hidden,)})
    body.end(body.op("expand.default", {"self": body.weights["value"]}, hidden, size=(TOKENS, hidden)))
    return Kind(name, Region(body.block), {"value": (hidden,)}, {})


def affine(hidden: int, rank: int, *, name: str = "affine") -> Kind:
    """A linear map of low rank and an offset."""
    own = {"right": (rank, hidden), "left": (hidden, rank), "left_bias": (hidden,)}
    body = _Body(hidden, own)
    body.end(body.linear(body.linear(body.rows, "right"), "left", "left_bias"))
    return Kind(name, Region(body.block), own, {})


@dataclass
class MixedLayer:
    """A module `y = layer(x)`, or `layer(x, ids, gates)` without a route, and its tensors by weight name."""

    op: ModuleOp
    weights: dict[str, torch.Tensor]
    experts: ExpertsOp


def mixed_layer(
    kinds: Sequence[tuple[Kind, tuple[int, ...]]],
    stored: tuple[int, ...],
    *,
    hidden: int,
    routing: Routing | None = None,
    slots: int = 2,
    protected: tuple[int, ...] = (),
    seed: int = 0,
) -> MixedLayer:
    """One layer with a class of each of `kinds`, whose experts are given beside it. With `routing` it has a router."""
    arguments = {"x": f32(COUNT, hidden)}
    if routing is None:
        arguments |= {"ids": TensorType((COUNT, slots), DType.I64), "gates": f32(COUNT, slots)}
    function = FuncOp.build("main", list(arguments.values()), arg_names=list(arguments))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, shape: tuple[int, ...]) -> Value:
        tensors[name] = torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        op = WeightOp(result_types=[f32(*shape)], weight_name=name, source=name)
        function.body.append(op)
        return op.value

    x = function.arguments[0]
    routed: tuple[Value, Value]
    if routing is not None:
        router = weight("router", (len(stored), hidden))
        logits = aten.build("linear.default", {"input": x, "weight": router}, (f32(COUNT, len(stored)),))
        route = RouteOp(logits.result, routing=routing)
        function.body.append(logits)
        function.body.append(route)
        routed = (route.ids, route.gates)
    else:
        routed = (function.arguments[1], function.arguments[2])
    weights: list[Value] = []
    for kind, members in kinds:
        weights += [weight(f"{kind.name}.{name}", (len(members), *shape)) for name, shape in kind.own.items()]
        weights += [weight(f"{kind.name}.{name}", shape) for name, shape in kind.shared.items()]
    experts = ExpertsOp(
        x,
        *routed,
        weights,
        regions=[kind.body for kind, _ in kinds],
        stored=stored,
        classes=tuple(
            ExpertClass(members, len(kind.own) + len(kind.shared), len(kind.shared)) for kind, members in kinds
        ),
        protected=protected,
    )
    function.body.append(experts)
    function.finish([experts.y], ["y"])
    module = ModuleOp.build([function])
    verify(module)
    return MixedLayer(module, tensors, experts)


def by_hand(
    kinds: Sequence[tuple[Kind, tuple[int, ...]]],
    stored: tuple[int, ...],
    weights: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    """The layer token by token and slot by slot, without the IR."""
    y = torch.zeros_like(x)
    for token in range(len(x)):
        for slot in range(ids.shape[1]):
            target = stored[int(ids[token, slot])]
            for kind, members in kinds:
                if target in members:
                    own = {name: weights[f"{kind.name}.{name}"][members.index(target)] for name in kind.own}
                    shared = {name: weights[f"{kind.name}.{name}"] for name in kind.shared}
                    y[token] += gates[token, slot] * _expert({**own, **shared}, x[token])
    return y


def _expert(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if "value" in weights:
        return weights["value"]
    if "left" in weights:
        return weights["left"] @ (weights["right"] @ x) + weights["left_bias"]

    def matrix(name: str, rows: torch.Tensor) -> torch.Tensor:
        whole = weights[name] if name in weights else weights[f"{name}_left"] @ weights[f"{name}_right"]
        whole = whole + weights[f"{name}_base"] if f"{name}_base" in weights else whole
        bias = weights.get(f"{name}_bias")
        return whole @ rows if bias is None else whole @ rows + bias

    return matrix("down", torch.nn.functional.silu(matrix("gate", x)) * matrix("up", x))
