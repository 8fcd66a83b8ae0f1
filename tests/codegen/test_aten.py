"""Each aten emission against torch: results and element types, with a symbolic leading size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.codegen.onnx.registry import EMISSIONS
from moec.codegen.onnx.targets import Target
from moec.dialects import aten
from moec.errors import UnsupportedModelError
from moec.ir import DType, Operation, TensorType, Value, symbol
from tests.codegen.running import assert_close, emit_and_run, module_of, one_operation

BATCH = 5  # no other size is 5, so that it can stand for the symbol
COUNT = symbol("batch")
DTYPES = {torch.float32: DType.F32, torch.int64: DType.I64, torch.bool: DType.I1, torch.int32: DType.I32}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def positive(*shape: int) -> torch.Tensor:
    return normal(*shape).abs() + 0.1


def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(high))


def booleans(*shape: int) -> torch.Tensor:
    return normal(*shape) > 0


@dataclass(frozen=True)
class Case:
    """One call of an overload: tensors by schema argument (a list for a list of tensors), other arguments."""

    name: str
    tensors: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.arguments}" if self.arguments else self.name


def one(name: str, x: torch.Tensor, **arguments: Any) -> Case:
    return Case(name, {"self": x}, arguments)


def two(name: str, x: torch.Tensor, y: torch.Tensor, **arguments: Any) -> Case:
    return Case(name, {"self": x, "other": y}, arguments)


X, Y = normal(BATCH, 4, 6), normal(4, 1)
N, M = integers(9, BATCH, 4, low=-9), integers(4, BATCH, 4, low=1)
P, Q = booleans(BATCH, 4), booleans(4)
CASES = [
    *[two(f"{name}.Tensor", X, Y) for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")],
    *[one(f"{name}.Scalar", X, other=1.5) for name in ("add", "sub", "mul", "div", "rsub", "lt", "ge", "remainder")],
    *[one(f"{name}.Scalar", N, other=2) for name in ("add", "mul", "eq", "gt", "remainder", "floor_divide")],
    two("add.Tensor", X, Y, alpha=2.5),
    two("add.Tensor", N, X[:, :, 0]),
    two("mul.Tensor", P, X[:, :, 0]),
    two("mul.Tensor", P, Q),
    one("lt.Scalar", N, other=1.5),
    one("div.Scalar", N, other=2),
    two("div.Tensor_mode", N, M, rounding_mode="floor"),
    two("div.Tensor_mode", X, Y, rounding_mode="floor"),
    two("div.Tensor_mode", X, Y, rounding_mode="trunc"),
    two("floor_divide.default", N, M),
    two("remainder.Tensor", X, Y),
    two("maximum.default", X, Y),
    two("minimum.default", X, Y),
    *[one("pow.Tensor_Scalar", positive(BATCH, 3), exponent=exponent) for exponent in (2, 0.5, -0.5, 1, 3, -1.5)],
    Case("pow.Tensor_Tensor", {"self": positive(BATCH, 3), "exponent": normal(3)}),
    *[
        one(f"{name}.default", X)
        for name in (
            "abs", "neg", "exp", "sigmoid", "tanh", "relu", "silu", "mish", "hardswish", "hardsigmoid", "erf", "sin",
            "cos", "floor", "ceil", "round", "sign", "softplus", "expm1", "square", "elu", "leaky_relu", "hardtanh",
            "relu6", "isnan", "isfinite", "isinf", "atan",
        )
    ],
    *[one(f"{name}.default", positive(BATCH, 3)) for name in ("sqrt", "rsqrt", "log", "log1p", "log2", "reciprocal")],
    one("gelu.default", X),
    one("gelu.default", X, approximate="tanh"),
    one("softplus.default", X, beta=2.0, threshold=1.0),
    one("clamp.default", X, min=-0.5),
    one("clamp.default", X, max=0.5),
    one("clamp.default", X, min=-0.5, max=0.5),
    one("clamp_min.default", X, min=0.25),
    one("clamp_max.default", X, max=0.25),
    Case("clamp.Tensor", {"self": X, "min": Y, "max": Y + 1}),
    Case("where.self", {"condition": P, "self": X[:, :, 0], "other": N}),
    Case("where.ScalarOther", {"condition": P, "self": X[:, :, 0]}, {"other": -1.0}),
    Case("where.ScalarSelf", {"condition": P, "other": X[:, :, 0]}, {"self": 2.0}),
    Case("masked_fill.Scalar", {"self": X[:, :, 0], "mask": P}, {"value": float("-inf")}),
    two("logical_and.default", P, Q),
    two("logical_or.default", P, Q),
    two("bitwise_and.Tensor", P, Q),
    two("bitwise_or.Tensor", N, M),
    one("logical_not.default", N),
    one("bitwise_not.default", P),
    one("_to_copy.default", N, dtype=torch.float32),
    one("_to_copy.default", X, dtype=torch.int64),
    one("clone.default", X),
    one("full_like.default", X, fill_value=2.5),
    one("zeros_like.default", N),
    Case("full.default", {}, {"size": [BATCH, 3], "fill_value": 1.5, "dtype": torch.float32}),
    Case("full.default", {}, {"size": [2, 3], "fill_value": True, "dtype": torch.bool}),
    one("view.default", X, size=[BATCH, 24]),
    one("view.default", X, size=[BATCH, 2, 2, 6]),
    one("view.default", normal(BATCH, 6, 4), size=[BATCH * 6, 4]),
    one("view.default", X, size=[BATCH * 4, 3, 2]),
    one("unsqueeze.default", X, dim=-2),
    one("squeeze.dim", normal(BATCH, 1, 3), dim=1),
    one("permute.default", X, dims=[0, 2, 1]),
    one("transpose.int", X, dim0=-1, dim1=0),
    one("t.default", normal(BATCH, 3)),
    one("expand.default", normal(BATCH, 1, 3), size=[BATCH, 4, 3]),
    one("expand.default", normal(1, 3), size=[BATCH, 2, 3]),
    one("slice.Tensor", X, dim=1, start=1, end=3),
    one("slice.Tensor", X, dim=2, start=1, end=6, step=2),
    one("slice.Tensor", X, dim=-1, start=-2, end=6),
    one("select.int", X, dim=1, index=-1),
    Case("cat.default", {"tensors": [X, normal(BATCH, 4, 3)]}, {"dim": -1}),
    Case("stack.default", {"tensors": [P, P]}, {"dim": 1}),
    one("split.Tensor", X, split_size=4, dim=2),
    one("split_with_sizes.default", X, split_sizes=[1, 3], dim=1),
    one("chunk.default", X, chunks=2, dim=-1),
    one("unbind.int", X, dim=1),
    one("repeat.default", normal(BATCH, 2), repeats=[2, 1, 3]),
    Case("arange.start_step", {}, {"start": 1, "end": 10, "step": 3, "dtype": torch.int64}),
    Case("gather.default", {"self": X, "index": integers(6, BATCH, 4, 2)}, {"dim": 2}),
    Case("index_select.default", {"self": X, "index": integers(4, 7)}, {"dim": 1}),
    Case("embedding.default", {"weight": normal(9, 3), "indices": integers(9, BATCH, 4)}),
    Case("index.Tensor", {"self": X, "indices": [integers(4, BATCH), integers(4, BATCH)]}),
    Case("index.Tensor", {"self": X, "indices": [integers(4, 7)]}),
    Case("scatter.src", {"self": X, "index": integers(6, BATCH, 4, 1), "src": normal(BATCH, 4, 2)}, {"dim": 2}),
    Case("scatter.value", {"self": X, "index": integers(6, BATCH, 4, 1)}, {"dim": 2, "value": -3.0}),
    Case("scatter_add.default", {"self": X, "index": integers(6, BATCH, 4, 6), "src": X}, {"dim": 2}),
    one("constant_pad_nd.default", X, pad=[1, 2, 0, 3], value=0.5),
    one("one_hot.default", integers(4, BATCH, 3), num_classes=4),
    one("tril.default", normal(BATCH, 4, 4)),
    one("triu.default", normal(BATCH, 4, 4), diagonal=1),
    one("roll.default", X, shifts=[1], dims=[1]),
    one("flip.default", X, dims=[1, 2]),
    one("mean.dim", X, dim=[-1], keepdim=True),
    one("sum.dim_IntList", X, dim=[1, 2]),
    one("sum.dim_IntList", P, dim=[1]),
    one("amax.default", X, dim=[-1]),
    one("logsumexp.default", X, dim=[1]),
    one("any.dim", P, dim=1),
    one("all.dim", P, dim=1, keepdim=True),
    one("var.correction", X, dim=[1], correction=0),
    one("var.correction", X, dim=[2], keepdim=True),
    one("var_mean.correction", X, dim=[2], correction=0, keepdim=True),
    one("softmax.int", X, dim=1),
    one("log_softmax.int", X, dim=-1),
    one("topk.default", X, k=3),
    one("sort.default", X, dim=1, descending=True),
    one("argmax.default", X, dim=-1),
    one("max.dim", X, dim=1),
    one("cumsum.default", N, dim=1),
    Case("layer_norm.default", {"input": X, "weight": normal(6), "bias": normal(6)}, {"normalized_shape": [6]}),
    Case("layer_norm.default", {"input": X}, {"normalized_shape": [6]}),
    Case("rms_norm.default", {"input": X, "weight": normal(6)}, {"normalized_shape": [6], "eps": 1e-5}),
    Case("linear.default", {"input": X, "weight": normal(3, 6), "bias": normal(3)}),
    Case("linear.default", {"input": normal(BATCH, 6), "weight": normal(3, 6), "bias": normal(3)}),
    two("matmul.default", X, normal(6, 3)),
    Case("bmm.default", {"self": X, "mat2": normal(BATCH, 6, 3)}),
    Case("addmm.default", {"self": normal(3), "mat1": normal(BATCH, 6), "mat2": normal(6, 3)}, {"beta": 2, "alpha": 3}),
    Case("einsum.default", {"tensors": [X, normal(BATCH, 6, 3)]}, {"equation": "bij, bjk -> bik"}),
    Case(
        "scaled_dot_product_attention.default",
        {
            "query": normal(BATCH, 2, 3, 4), "key": normal(BATCH, 2, 7, 4), "value": normal(BATCH, 2, 7, 4),
            "attn_mask": booleans(3, 7),
        },
    ),
    Case("conv1d.default", {"input": normal(BATCH, 4, 9), "weight": normal(4, 1, 3)}, {"groups": 4, "padding": [2]}),
]  # fmt: skip


def _sizes(shape: Any) -> tuple[Any, ...]:
    return tuple(COUNT * (size // BATCH) if size and size % BATCH == 0 else size for size in shape)


def _symbolic(value: Any) -> Any:
    """Arguments as the IR has them: tuples, element types, sizes."""
    if isinstance(value, list):
        return tuple(COUNT * (item // BATCH) if item and item % BATCH == 0 else item for item in value)
    return DTYPES[value] if isinstance(value, torch.dtype) else value


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch(case: Case, tmp_path: Path) -> None:
    assert f"aten.{case.name}" in EMISSIONS
    packet, _, overload = case.name.partition(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    results = function(**case.tensors, **case.arguments)
    results = list(results) if isinstance(results, tuple | list) else [results]
    flat: dict[str, torch.Tensor] = {}
    for name, tensors in case.tensors.items():
        for position, tensor in enumerate(tensors if isinstance(tensors, list) else [tensors]):
            flat[f"{name}_{position}"] = tensor

    names = list(flat)

    def make(*arguments: Value) -> aten.AtenOp:
        given = dict(zip(names, arguments, strict=True))
        operands: dict[str, Value | tuple[Value, ...]] = {}
        for name, tensors in case.tensors.items():
            count = len(tensors) if isinstance(tensors, list) else 1
            values = tuple(given[f"{name}_{position}"] for position in range(count))
            operands[name] = values if isinstance(tensors, list) else values[0]
        types = tuple(TensorType(_sizes(result.shape), DTYPES[result.dtype]) for result in results)
        symbolic = {name: _symbolic(value) for name, value in case.arguments.items()}
        return aten.build(case.name, operands, types, **symbolic)

    types = {name: TensorType(_sizes(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in flat.items()}
    # something has to have the symbolic size
    types["any"], flat["any"] = TensorType((COUNT,), DType.F32), torch.zeros(BATCH)
    module = module_of(one_operation(types, lambda *arguments: make(*arguments[: len(names)])))
    for target in Target:
        found, _ = emit_and_run(module, flat, tmp_path / target.value, target=target)
        for index, result in enumerate(results):
            assert found[f"y{index}"].dtype == result.numpy().dtype
            assert_close(found[f"y{index}"].astype(np.float64), result.double().numpy())


def test_index_of_a_later_axis(tmp_path: Path) -> None:
    """`x[:, index]`: the layout says which axis the index is for."""
    kind = TensorType((COUNT, 4, 6), DType.F32)
    result = TensorType((COUNT, 3, 6), DType.F32)

    def make(x: Value, index: Value) -> Operation:
        layout = {"operand_layout": ("self", "indices:1")}
        return Operation.create("aten.index.Tensor", [x, index], [result], layout)

    types = {"x": kind, "index": TensorType((3,), DType.I64)}
    feeds = {"x": X, "index": torch.tensor([3, 0, -1])}
    found, _ = emit_and_run(module_of(one_operation(types, make)), feeds, tmp_path)
    assert_close(found["y0"], X[:, feeds["index"]].numpy())


def test_unknown_operations_are_named(tmp_path: Path) -> None:
    def make(x: Value) -> aten.AtenOp:
        return aten.build("nonzero.default", {"self": x}, (TensorType((COUNT, 1), DType.I64),))

    module = module_of(one_operation({"x": TensorType((COUNT,), DType.F32)}, make))
    with pytest.raises(UnsupportedModelError, match=r"aten\.nonzero\.default has no ONNX form"):
        emit_and_run(module, {"x": normal(BATCH)}, tmp_path)
    assert not (tmp_path / "model.onnx").exists()
