"""A small MoE layer as IR, for tests."""

from __future__ import annotations

from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, Normalize, RouteOp, Routing, YieldOp
from moec.dialects.nn import TOKENS, RMSNormOp
from moec.ir import Block, DType, Location, Operation, Region, TensorType, Value, symbol

HIDDEN, WIDTH, EXPERTS = 64, 48, 8
BATCH_SEQ = (symbol("batch"), symbol("seq"))
TOKEN_COUNT = symbol("batch") * symbol("seq")


def f32(*shape: object) -> TensorType:
    return TensorType(tuple(shape), DType.F32)  # type: ignore[arg-type]


def swiglu_body(hidden: int = HIDDEN, width: int = WIDTH) -> Region:
    """silu(gate) * up, then down, on [tokens, hidden] from [2 * width, hidden] and [hidden, width]."""
    block = Block([f32(TOKENS, hidden), f32(2 * width, hidden), f32(hidden, width)])
    x, gate_up, down = block.arguments
    half = f32(TOKENS, width)
    projected = aten.build("linear.default", {"input": x, "weight": gate_up}, (f32(TOKENS, 2 * width),))
    halves = aten.build("chunk.default", {"self": projected.result}, (half, half), chunks=2, dim=-1)
    gate = aten.build("silu.default", {"self": halves.results[0]}, (half,))
    product = aten.build("mul.Tensor", {"self": gate.result, "other": halves.results[1]}, (half,))
    out = aten.build("linear.default", {"input": product.result, "weight": down}, (f32(TOKENS, hidden),))
    for op in (projected, halves, gate, product, out):
        block.append(op)
    block.append(YieldOp([out.result], result_types=[]))
    return Region(block)


def moe_module() -> ModuleOp:
    """x [batch * seq, 64] -> top-2 of 8 SwiGLU experts."""
    function = FuncOp.build("main", [f32(TOKEN_COUNT, HIDDEN)], arg_names=["x"])
    x = function.arguments[0]

    def weight(name: str, source: str, *shape: int) -> Value:
        op = WeightOp(result_types=[f32(*shape)], weight_name=name, source=source)
        function.body.append(op)
        return op.value

    router = weight("router", "router.weight", EXPERTS, HIDDEN)
    gate_up = weight("gate_up", "stack(0, experts.{0:8}.gate_up)", EXPERTS, 2 * WIDTH, HIDDEN)
    down = weight("down", "stack(0, experts.{0:8}.down)", EXPERTS, HIDDEN, WIDTH)
    logits = aten.build("linear.default", {"input": x, "weight": router}, (f32(TOKEN_COUNT, EXPERTS),))
    route = RouteOp(logits.result, routing=Routing(k=2, normalize=Normalize.SUM))
    experts = ExpertsOp(
        x,
        route.ids,
        route.gates,
        [gate_up, down],
        regions=[swiglu_body()],
        stored=tuple(range(EXPERTS)),
        classes=(ExpertClass(tuple(range(EXPERTS)), 2),),
    )
    for op in (logits, route, experts):
        function.body.append(op)
    function.finish([experts.y], ["y"])
    return ModuleOp.build([function])


def append_layer(block: Block, x: Value, scope: str) -> Value:
    """x [batch, seq, 64] + the experts of rms_norm(x): 16 operations, 6 of them in the body of the experts."""
    location = Location(name=scope, file="modeling.py", line=7, column=1)

    def append(op: Operation) -> Operation:
        op.location = location
        block.append(op)
        return op

    def weight(name: str, source: str, *shape: int) -> Value:
        op = WeightOp(result_types=[f32(*shape)], weight_name=f"{scope}.{name}", source=source)
        return append(op).result

    norm = weight("norm", f"{scope}.norm", HIDDEN)
    router = weight("router", f"{scope}.router.weight", EXPERTS, HIDDEN)
    gate_up = weight("gate_up", f"stack(0, {scope}.experts.{{0:8}}.gate_up)", EXPERTS, 2 * WIDTH, HIDDEN)
    down = weight("down", f"stack(0, {scope}.experts.{{0:8}}.down)", EXPERTS, HIDDEN, WIDTH)
    normed = append(RMSNormOp(x, norm, epsilon=1e-6)).result
    rows = append(
        aten.build("view.default", {"self": normed}, (f32(TOKEN_COUNT, HIDDEN),), size=(TOKEN_COUNT, HIDDEN))
    ).result
    logits = append(aten.build("linear.default", {"input": rows, "weight": router}, (f32(TOKEN_COUNT, EXPERTS),)))
    route = RouteOp(logits.result, routing=Routing(k=2, normalize=Normalize.SUM))
    append(route)
    experts = append(
        ExpertsOp(
            rows,
            route.ids,
            route.gates,
            [gate_up, down],
            regions=[swiglu_body()],
            stored=tuple(range(EXPERTS)),
            classes=(ExpertClass(tuple(range(EXPERTS)), 2),),
        )
    )
    shape = (*BATCH_SEQ, HIDDEN)
    back = append(aten.build("view.default", {"self": experts.result}, (f32(*shape),), size=shape)).result
    return append(aten.build("add.Tensor", {"self": x, "other": back}, (f32(*shape),))).result
