"""The executor itself: sizes, types, weights in memory, hooks, runs in pieces, errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from moec.dialects import aten
from moec.dialects.builtin import ConstantOp, FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp
from moec.errors import UnsupportedModelError, UsageError, VerificationError
from moec.ir import DenseConstant, DType, Location, Operation, TensorType, Value, symbol
from moec.reference import large_weights
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.reference.layers import AFTER_LAYERS, BEFORE_LAYERS, layer_segments
from moec.reference.symbols import bind_symbols
from moec.weights.context import WeightContext
from tests.ir.build import f32, moe_module

B, S, P = symbol("batch"), symbol("seq"), symbol("past")


def module_of(arguments: list[TensorType], build: object, names: list[str] | None = None) -> ModuleOp:
    """A module whose main consists of the operations that `build(*arguments)` yields; the last one's results return."""
    function = FuncOp.build("main", arguments, arg_names=names or [f"a{i}" for i in range(len(arguments))])
    ops: list[Operation] = list(build(*function.arguments))  # type: ignore[operator]
    for op in ops:
        function.body.append(op)
    function.finish(ops[-1].results, [f"r{i}" for i in range(len(ops[-1].results))])
    return ModuleOp.build([function])


# -- sizes


def test_symbols_are_solved_from_shapes() -> None:
    ids = TensorType((B, S), DType.I64)
    mask = TensorType((B, P + S), DType.I64)
    cache = TensorType((B, 2, P, 8), DType.F32)
    found = bind_symbols([("mask", mask, (3, 9)), ("ids", ids, (3, 4)), ("cache", cache, (3, 2, 5, 8))])
    assert found == {"batch": 3, "seq": 4, "past": 5}
    assert bind_symbols([("x", f32(B * S, 4), (6, 4))]) == {"batch": 1, "seq": 6}
    assert bind_symbols([("x", f32(2 * S + 1, B), (7, 2))]) == {"seq": 3, "batch": 2}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 4), (2, 4)], "size 2 where batch = 3 is due"),
        ([(3, 4), (3, 4, 1)], "has shape"),
        ([(3, 4), (3, 2)], "cannot be"),
    ],
)
def test_contradicting_sizes_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    kinds = [TensorType((B, S), DType.I64), TensorType((B, P + S), DType.I64)]
    with pytest.raises(UsageError, match=message):
        bind_symbols([(f"a{i}", kind, shape) for i, (kind, shape) in enumerate(zip(kinds, shapes, strict=True))])


def test_open_size_is_refused() -> None:
    with pytest.raises(UsageError, match="do not determine"):
        bind_symbols([("x", TensorType((P + S,), DType.F32), (5,))])


# -- aten


def _sizes(x: Value) -> Iterator[Operation]:
    yield (steps := aten.build("arange.start_step", {}, (TensorType((S,), DType.I64),), start=0, end=S, step=1))
    yield (scaled := aten.build("div.Scalar", {"self": steps.result}, (f32(S),), other=3))
    yield (row := aten.build("unsqueeze.default", {"self": scaled.result}, (f32(1, S),), dim=0))
    yield (added := aten.build("add.Tensor", {"self": x, "other": row.result}, (f32(B, S),)))
    yield (ones := aten.build("full.default", {}, (f32(B, 1),), size=(B, 1), fill_value=1.0))
    yield (both := aten.build("cat.default", {"tensors": (added.result, ones.result)}, (f32(B, S + 1),), dim=-1))
    yield (turned := aten.build("permute.default", {"self": both.result}, (f32(S + 1, B),), dims=(1, 0)))
    yield aten.build("view.default", {"self": turned.result}, (f32((S + 1) * B),), size=((S + 1) * B,))


def test_sizes_in_attributes_and_types_without_operands() -> None:
    """Also: a view of a tensor that is not dense, and integers that become floats of the run's precision."""
    module = module_of([f32(B, S)], _sizes)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 3, dtype=dtype)
        found = Executor(module, {}, dtype=dtype).run({"a0": x})["r0"]
        steps = torch.arange(3, dtype=dtype) / 3
        assert found.dtype == dtype
        assert torch.equal(found, torch.cat([x + steps, torch.ones(2, 1, dtype=dtype)], -1).T.reshape(-1))
    assert torch.get_default_dtype() is torch.float32


def _indexed(x: Value, index: Value) -> Iterator[Operation]:
    kind = f32(2, 4, 3)
    op = Operation.create("aten.index.Tensor", [x, index], [kind], {"operand_layout": ("self", "indices:1")}, [])
    yield op
    yield aten.build("split.Tensor", {"self": op.result}, (f32(2, 2, 3), f32(2, 2, 3)), split_size=2, dim=1)


def test_lists_of_optional_tensors_and_lists_of_results() -> None:
    module = module_of([f32(2, 5, 3), TensorType((4,), DType.I64)], _indexed)
    x, index = torch.randn(2, 5, 3), torch.tensor([4, 0, 0, 2])
    first, second = Executor(module, {}).run({"a0": x, "a1": index}).values()
    assert torch.equal(torch.cat([first, second], 1), x[:, index])


def test_casts_follow_the_run() -> None:
    """In a float64 run f32 means float64; a cast to a narrower type still rounds."""

    def build(x: Value) -> Iterator[Operation]:
        yield (half := aten.build("_to_copy.default", {"self": x}, (TensorType((4,), DType.F16),), dtype=DType.F16))
        yield (back := aten.build("_to_copy.default", {"self": half.result}, (f32(4),), dtype=DType.F32))
        yield aten.build("add.Tensor", {"self": back.result, "other": x}, (f32(4),))

    x = torch.rand(4, dtype=torch.float64)
    found = Executor(module_of([f32(4)], build), {}, dtype=torch.float64).run({"a0": x})["r0"]
    assert torch.equal(found, x.half().double() + x)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (DType.F32, torch.tensor([[1.5, -2.0]])),
        (DType.I64, torch.tensor([[7, -1]])),
        (DType.I1, torch.tensor([[True, False]])),
        (DType.BF16, torch.tensor([[1.5, 3.0]]).bfloat16()),
        (DType.C64, torch.tensor([[1 + 2j, -1j]])),
    ],
)
def test_constants(dtype: DType, values: torch.Tensor) -> None:
    data = DenseConstant(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    module = module_of([], lambda: iter([ConstantOp(result_types=[TensorType((1, 2), dtype)], data=data)]))
    assert torch.equal(Executor(module, {}).run({})["r0"], values)
    wide = Executor(module, {}, dtype=torch.float64).run({})["r0"]
    assert wide.dtype == (
        torch.float64 if dtype is DType.F32 else torch.complex128 if dtype is DType.C64 else values.dtype
    )
    assert torch.equal(wide.to(values.dtype), values)


# -- errors


def test_wrong_types_in_the_ir_are_reported_with_the_operation() -> None:
    def wrong(size: int) -> ModuleOp:
        return module_of([f32(B, 4)], lambda x: iter([aten.build("neg.default", {"self": x}, (f32(B, size),))]))

    with pytest.raises(VerificationError, match=r"aten.neg.default gave torch.float32 \[2, 4\], the IR says"):
        Executor(wrong(5), {}).run({"a0": torch.zeros(2, 4)})

    def failing(x: Value) -> Iterator[Operation]:
        yield aten.build("mm.default", {"self": x, "mat2": x}, (f32(B, 4),), Location(name="model.layers.1"))

    with pytest.raises(VerificationError, match=r"aten.mm.default failed.*model.layers.1"):
        Executor(module_of([f32(B, 4)], failing), {}).run({"a0": torch.zeros(2, 4)})


def test_unknown_operations_and_inputs_are_refused() -> None:
    unknown = module_of([f32(2)], lambda x: iter([Operation.create("quant.unheard", [x], [f32(2)], {}, [])]))
    with pytest.raises(UnsupportedModelError, match=r"quant\.unheard"):
        Executor(unknown, {})
    absent = module_of([f32(2)], lambda x: iter([Operation.create("aten.unheard.default", [x], [f32(2)], {}, [])]))
    with pytest.raises(UnsupportedModelError, match=r"no operation aten\.unheard\.default"):
        Executor(absent, {})
    executor = Executor(moe_module(), _moe_weights())
    with pytest.raises(UsageError, match="has no input z"):
        executor.run({"x": torch.zeros(1, 64), "z": torch.zeros(1)})
    with pytest.raises(UsageError, match="needs the input x"):
        executor.run({})
    with pytest.raises(UsageError, match="no weight nothing"):
        executor.run({"x": torch.zeros(1, 64)}, overrides={"nothing": torch.zeros(1)})
    with pytest.raises(UsageError, match="float32 or float64"):
        Executor(moe_module(), {}, dtype=torch.bfloat16)


def test_weight_of_another_shape_is_refused() -> None:
    given = _moe_weights()
    given["router.weight"] = torch.zeros(8, 63)
    with pytest.raises(UsageError, match=r"router has shape \[8, 63\], the module declares \[8, 64\]"):
        Executor(moe_module(), given).run({"x": torch.zeros(1, 64)})


# -- weights in memory


class CountingContext(WeightContext):
    """Knows how many bytes of the tensors that it gave out are alive."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(in_memory=tensors)
        self.live = 0
        self.peak = 0
        self.loads: list[tuple[str, object]] = []

    def load(self, expression: object, index: object = None) -> torch.Tensor:
        tensor = super().load(expression, index)  # type: ignore[arg-type]
        self.loads.append((str(expression), index))
        self.live += tensor.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor.untyped_storage(), self._free, tensor.nbytes)
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size


def deep_model(layers: int, width: int) -> tuple[ModuleOp, dict[str, torch.Tensor]]:
    """x -> tanh(x W) repeated, each W [width, width] of its own."""

    def build(x: Value) -> Iterator[Operation]:
        for index in range(layers):
            where = Location(name=f"model.layers.{index}.mlp")
            weight = WeightOp(
                result_types=[f32(width, width)], weight_name=f"w{index}", source=f"w{index}", location=where
            )
            yield weight
            yield (y := aten.build("mm.default", {"self": x, "mat2": weight.value}, (f32(B, width),), where))
            yield (last := aten.build("tanh.default", {"self": y.result}, (f32(B, width),), where))
            x = last.result
        yield aten.build("neg.default", {"self": x}, (f32(B, width),), Location(name="model.norm"))

    tensors = {f"w{index}": torch.randn(width, width) / width**0.5 for index in range(layers)}
    return module_of([f32(B, width)], build, ["x"]), tensors


def test_one_weight_at_a_time_is_in_memory() -> None:
    module, tensors = deep_model(12, 64)
    context = CountingContext(tensors)
    gc.disable()
    try:
        Executor(module, context).run({"x": torch.randn(2, 64)})
        assert context.peak <= 2 * 64 * 64 * 4
        assert context.live == 0
        kept = CountingContext(tensors)
        executor = Executor(module, kept)
        with executor.weights_kept():
            for _ in range(3):
                executor.run({"x": torch.randn(2, 64)})
        assert len(kept.loads) == 12 and kept.live == 0
    finally:
        gc.enable()


def test_vocabulary_sized_weights_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_weights, "LARGE_BYTES", 4096)
    rows, width = 500, 16

    def build(ids: Value) -> Iterator[Operation]:
        kind = f32(rows, width)
        yield (table := WeightOp(result_types=[kind], weight_name="table", source="table"))
        yield (bias := WeightOp(result_types=[f32(rows)], weight_name="bias", source="bias"))
        embedded = aten.build("embedding.default", {"weight": table.value, "indices": ids}, (f32(B, S, width),))
        yield embedded
        operands: dict[str, Value | tuple[Value, ...]] = {
            "input": embedded.result,
            "weight": table.value,
            "bias": bias.value,
        }
        yield aten.build("linear.default", operands, (f32(B, S, rows),))

    tensors = {"table": torch.randn(rows, width), "bias": torch.randn(rows)}
    ids = torch.tensor([[3, 499, 3], [0, 7, 7]])
    expected = torch.nn.functional.linear(tensors["table"][ids], tensors["table"], tensors["bias"])
    context = CountingContext(tensors)
    module = module_of([TensorType((B, S), DType.I64)], build)
    gc.disable()
    try:
        found = Executor(module, context).run({"a0": ids})["r0"]
    finally:
        gc.enable()
    assert torch.allclose(found, expected, atol=1e-5)
    assert context.peak <= 3 * 4096
    gradients: list[torch.Tensor] = []
    for limit in (4096, 1 << 30):
        monkeypatch.setattr(large_weights, "LARGE_BYTES", limit)
        table = tensors["table"].clone().requires_grad_()
        output = Executor(module, tensors).run({"a0": ids}, overrides={"table": table})["r0"]
        gradients += torch.autograd.grad(output.square().sum(), table)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)


def test_experts_are_loaded_one_by_one() -> None:
    context = CountingContext(_moe_weights())
    executor = Executor(moe_module(), context)
    gc.disable()
    try:
        executor.run({"x": torch.randn(1, 64)})
        one_expert = (96 * 64 + 64 * 48) * 4
        assert context.peak <= one_expert
        rows = [index for _, index in context.loads if index is not None]
        assert len(rows) == 4, "two experts with two stacks each"
    finally:
        gc.enable()


def _moe_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    given = {"router.weight": torch.randn(8, 64, generator=generator)}
    for expert in range(8):
        given[f"experts.{expert}.gate_up"] = torch.randn(96, 64, generator=generator) / 8
        given[f"experts.{expert}.down"] = torch.randn(64, 48, generator=generator) / 7
    return given


# -- hooks and pieces


def test_observers_see_every_operation_and_the_expert_it_belongs_to() -> None:
    seen: list[tuple[str, int | None]] = []
    inputs: dict[str, torch.Tensor] = {}

    def observe(observation: Observation) -> None:
        seen.append((observation.op.name, observation.expert))
        if isinstance(observation.op, ExpertsOp):
            inputs["x"] = observation.operand(observation.op.x)
            inputs["ids"] = observation.operand(observation.op.ids)

    x = torch.randn(3, 64)
    Executor(moe_module(), _moe_weights()).run({"x": x}, observers=[observe])
    used = set(inputs["ids"].flatten().tolist())
    assert torch.equal(inputs["x"], x)
    assert {expert for name, expert in seen if name == "aten.silu.default"} == used
    assert [name for name, expert in seen if expert is None] == ["aten.linear.default", "moe.route", "moe.experts"]


def test_layers_can_be_run_one_after_the_other() -> None:
    module, tensors = deep_model(3, 8)
    executor = Executor(module, tensors)
    segments = layer_segments(module.main.body, executor.steps)
    assert [segment.name for segment in segments] == [f"model.layers.{i}" for i in range(3)] + [AFTER_LAYERS]
    x = torch.randn(2, 8)
    with executor.session({"x": x}) as execution:
        for segment in segments[:2]:
            execution.run(segment.steps)
        (hidden,) = [execution.values[value] for value in segments[1].outputs]
        execution.values[segments[1].outputs[0]] = 2 * hidden
        for segment in segments[2:]:
            execution.run(segment.steps)
        found = execution.results()["r0"]
    expected = torch.tanh(x @ tensors["w0"])
    expected = 2 * torch.tanh(expected @ tensors["w1"])
    assert torch.allclose(found, -torch.tanh(expected @ tensors["w2"]), atol=1e-6)


def test_values_are_freed_after_their_last_use() -> None:
    module, tensors = deep_model(3, 8)
    executor = Executor(module, tensors)
    with executor.session({"x": torch.randn(2, 8)}) as execution:
        for step in executor.steps:
            execution.run([step])
            assert len(execution.values) == 1
        assert set(execution.values) == set(module.main.return_op.operands)


def test_segment_before_the_layers() -> None:
    def build(x: Value) -> Iterator[Operation]:
        yield (a := aten.build("neg.default", {"self": x}, (f32(2),), Location(name="model.embed")))
        yield aten.build("exp.default", {"self": a.result}, (f32(2),), Location(name="transformer.h.0"))

    module = module_of([f32(2)], build)
    executor = Executor(module, {})
    segments = layer_segments(module.main.body, executor.steps)
    assert [segment.name for segment in segments] == [BEFORE_LAYERS, "transformer.h.0"]
    assert [len(segment.outputs) for segment in segments] == [1, 1]


def test_observed_steering_sends_tokens_where_it_says() -> None:
    chosen: list[torch.Tensor] = []

    def observe(observation: Observation) -> None:
        if observation.op.name == "moe.route":
            chosen.append(observation.results[0])

    target = torch.tensor([7, 0, 3, -1])
    x = torch.randn(4, 64)
    executor = Executor(moe_module(), _moe_weights())
    executor.run({"x": x}, observers=[observe])
    executor.run({"x": x}, observers=[observe], steering=lambda op, choice: target)
    free, steered = chosen
    assert steered[:3, 0].tolist() == [7, 0, 3]
    assert torch.equal(steered[3], free[3])
