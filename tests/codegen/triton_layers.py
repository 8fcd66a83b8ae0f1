"""One module with many layers with experts side by side, emitted as kernels and run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.running import LayerOutput, LayerRows, Place, run_layers
from moec.codegen.triton.spec import Element
from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing
from moec.dialects.nn import MLPOp
from moec.experts import (
    Expert,
    FeedForward,
    LayerRun,
    MoeLayer,
    Projection,
    Quantized,
    find_moe_layers,
    load_expert,
    replace_experts,
    run_layer,
)
from moec.experts.parts import copy_region
from moec.ir import Location, Value, symbol, verify
from moec.module import Module, SourceFacts
from moec.quantization.rounding import Target, round_matrix
from moec.reference.executor import Executor
from moec.weights.context import WeightContext
from moec.weights.store import WeightStore
from tests.ir.build import f32
from tests.ir.expert_bodies import Kind, dense

COUNT = symbol("count")
HIDDEN = 32

WITH_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
PLACES = [pytest.param(place, marks=[WITH_GPU] * (place is Place.GPU), id=place.name.lower()) for place in Place]
"""Where a test runs kernels."""
DEVICES = ["cpu", pytest.param("cuda", marks=WITH_GPU)]
"""Where a test runs operators: in torch on a CPU, by kernels on a GPU."""


def four_experts(width: int = 48) -> list[tuple[Kind, tuple[int, ...]]]:
    """One class of SwiGLU experts."""
    return [(dense(HIDDEN, width), (0, 1, 2, 3))]


@dataclass(frozen=True)
class Case:
    """A layer: classes of experts, router output to expert, vectors of the route by name, and how to pack experts.

    `changed` makes other experts of some; `shared` are blocks that every token has, with a sigmoid gate or without.
    With `features` the router reads so many hidden activations of its own instead of the rows.
    """

    name: str
    kinds: Sequence[tuple[Kind, tuple[int, ...]]] = field(default_factory=four_experts)
    stored: tuple[int, ...] = (0, 1, 2, 3)
    routing: Routing = field(default_factory=lambda: Routing(k=2))
    operands: Mapping[str, torch.Tensor] = field(default_factory=dict)
    router_bias: torch.Tensor | None = None
    packed: Mapping[int, Target] = field(default_factory=dict)
    changed: Mapping[int, Callable[[FeedForward], Expert]] = field(default_factory=dict)
    shared: Sequence[tuple[Kind, bool]] = ()
    features: int = 0


def build(cases: Sequence[Case], hidden: int = HIDDEN, store: Path | None = None, seed: int = 0) -> Module:
    """`y_i = layer_i(x)` for every case, with random weights; packed ones go to `store`."""
    function = FuncOp.build("main", [f32(COUNT, hidden)], arg_names=["x"])
    x = function.arguments[0]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def weight(name: str, value: torch.Tensor) -> Value:
        tensors[name] = value
        op = WeightOp(result_types=[f32(*value.shape)], weight_name=name, source=name)
        function.body.append(op)
        return op.value

    def random(name: str, shape: tuple[int, ...]) -> Value:
        return weight(name, torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5)

    results = []
    for number, case in enumerate(cases):
        at = f"layer{number}"
        seen = x
        if case.features:
            inner = {"input": x, "weight": random(f"{at}.features", (case.features, hidden))}
            for made in (
                linear := aten.build("linear.default", inner, (f32(COUNT, case.features),)),
                activated := aten.build("silu.default", {"self": linear.result}, (f32(COUNT, case.features),)),
            ):
                function.body.append(made)
            seen = activated.result
        size = (len(case.stored), case.features or hidden)
        rows: dict[str, Value] = {"input": seen, "weight": random(f"{at}.router", size)}
        if case.router_bias is not None:
            rows["bias"] = weight(f"{at}.router_bias", case.router_bias)
        logits = aten.build("linear.default", rows, (f32(COUNT, len(case.stored)),))
        function.body.append(logits)
        vectors = {name: weight(f"{at}.{name}", value) for name, value in case.operands.items()}
        given = [vectors.get(name) for name in _ORDER]
        route = RouteOp(logits.result, *given, routing=case.routing)
        function.body.append(route)
        weights: list[Value] = []
        for kind, members in case.kinds:
            own = {name: (len(members), *shape) for name, shape in kind.own.items()}
            weights += [random(f"{at}.{kind.name}.{name}", shape) for name, shape in {**own, **kind.shared}.items()]
        experts = ExpertsOp(
            x,
            route.ids,
            route.gates,
            weights,
            regions=[copy_region(kind.body) for kind, _ in case.kinds],
            stored=case.stored,
            classes=tuple(
                ExpertClass(members, len(kind.own) + len(kind.shared), len(kind.shared)) for kind, members in case.kinds
            ),
        )
        function.body.append(experts)
        result = experts.y
        for index, (kind, gated) in enumerate(case.shared):
            own = [random(f"{at}.shared{index}.{name}", shape) for name, shape in kind.own.items()]
            block = MLPOp(x, own, regions=[copy_region(kind.body)], location=Location(name=f"{at}.shared{index}"))
            function.body.append(block)
            more = block.y
            if gated:
                gate = {"input": x, "weight": random(f"{at}.shared{index}.sigmoid", (1, hidden))}
                logit = aten.build("linear.default", gate, (f32(COUNT, 1),))
                weight_op = aten.build("sigmoid.default", {"self": logit.result}, (f32(COUNT, 1),))
                product = aten.build("mul.Tensor", {"self": weight_op.result, "other": more}, (f32(COUNT, hidden),))
                for op in (logit, weight_op, product):
                    function.body.append(op)
                more = product.result
            total = aten.build("add.Tensor", {"self": result, "other": more}, (f32(COUNT, hidden),))
            function.body.append(total)
            result = total.result
        results.append(result)
    function.finish(results, [f"y{number}" for number in range(len(results))])
    op = ModuleOp.build([function])
    verify(op)
    context = WeightContext(None, None if store is None else WeightStore(store), tensors)
    for layer, case in zip(find_moe_layers(op), cases, strict=True):
        new: dict[int, Expert] = {
            number: _packed(layer, context, number, target) for number, target in case.packed.items()
        }
        for number, change in case.changed.items():
            expert = load_expert(layer, context, number)
            assert isinstance(expert, FeedForward)
            new[number] = change(expert)
        replace_experts(layer, context, new)
    verify(op)
    return Module(op, context, SourceFacts("module"))


def _packed(layer: MoeLayer, weights: WeightContext, number: int, target: Target) -> FeedForward:
    expert = load_expert(layer, weights, number)
    assert isinstance(expert, FeedForward)

    def change(projection: Projection) -> Projection:
        return replace(projection, matrix=Quantized(round_matrix(target, projection.dense())))

    gate = None if expert.gate is None else change(expert.gate)
    return replace(expert, gate=gate, up=change(expert.up), down=change(expert.down))


_ORDER = ("logit_bias", "mask", "score_override", "override_on", "select_bias", "forced_ids", "per_expert_scale")


@dataclass(frozen=True)
class Outcome:
    """What the kernels of a layer gave and what the reference executor gives in float64, its choice if `has_choice`."""

    found: LayerOutput
    expected: LayerRun
    has_choice: bool = True

    def difference(self) -> float:
        """Largest difference of outputs relative to the largest expected one; infinite for NaN."""
        expected = self.expected.y
        assert expected is not None
        distance = (self.found.y.double() - expected).abs().nan_to_num(torch.inf)
        return float(distance.max() / expected.abs().max().clamp_min(1e-30))


def _whole_results(module: Module, rows: torch.Tensor) -> list[torch.Tensor]:
    """The results of all layers with what is added to them."""
    with torch.no_grad():
        found = Executor(module.op, module.weights, dtype=torch.float64).run({"x": rows.double()})
    return list(found.values())


def rows_of(count: int, hidden: int = HIDDEN) -> torch.Tensor:
    """Random rows."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(count))


def outcomes(
    cases: Mapping[Element, Sequence[Case]], counts: Sequence[int], folder: Path, hidden: int, place: Place
) -> dict[tuple[Element, str, int], Outcome]:
    """Every case of every element type on every count of tokens. The kernels run in one process."""
    requests: list[LayerRows] = []
    expected: list[tuple[tuple[Element, str, int], LayerRun, bool]] = []
    for element, some in cases.items():
        module = build(some, hidden, folder / "store")
        emit_triton(module, folder / element.value, element=element)
        for number, (case, layer) in enumerate(zip(some, find_moe_layers(module.op), strict=True)):
            for count in counts:
                rows = rows_of(count, hidden).to(element.torch)
                requests.append(LayerRows(folder / element.value / PACKAGE_NAME, number, rows.float()))
                seen = (
                    torch.zeros(count, case.features or hidden, dtype=torch.float64) if case.features else rows.double()
                )
                run = run_layer(layer, module.weights, rows.double(), seen, torch.float64)
                if case.shared or case.features:
                    run = replace(run, y=_whole_results(module, rows)[number])
                expected.append(((element, case.name, count), run, not case.features))
    found = run_layers(requests, place)
    return {key: Outcome(output, run, chosen) for (key, run, chosen), output in zip(expected, found, strict=True)}
