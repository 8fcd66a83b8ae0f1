"""The nn dialect in ONNX against the reference executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from moec.codegen.onnx.emit import MODEL_FILE
from moec.codegen.onnx.targets import Target
from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp
from moec.dialects.nn import AttentionMaskOp, AttentionOp, LayerNormOp, RMSNormOp, RotaryOp
from moec.ir import DType, Operation, TensorType, Value, symbol
from tests.codegen.running import assert_close, emit_and_run, module_of, one_operation, reference

SIZES = {"batch": 2, "seq": 3, "past": 4}
BATCH, SEQ, PAST = (symbol(name) for name in SIZES)
TARGETS = [pytest.param(target, id=target.value) for target in Target]


def f32(*shape: Any) -> TensorType:
    return TensorType(shape, DType.F32)


def check(
    types: dict[str, TensorType], make: Any, target: Target, folder: Path, **given: torch.Tensor
) -> dict[str, Any]:
    """Random arguments of the given types, but for those given; returns what ONNX gave."""
    generator = torch.Generator().manual_seed(0)
    feeds = {name: torch.randn(kind.evaluate(SIZES), generator=generator) for name, kind in types.items()}
    feeds.update(given)
    # symbols that are no argument's own size would have no value at run time
    for name, size in SIZES.items():
        types[f"size_{name}"], feeds[f"size_{name}"] = f32(symbol(name)), torch.zeros(size)
    module = module_of(one_operation(types, lambda *values: make(*values[: len(types) - len(SIZES)])))
    found, _ = emit_and_run(module, feeds, folder, target=target)
    expected = reference(module, feeds)
    for name, value in expected.items():
        assert_close(found[name], value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float, target: Target, tmp_path: Path) -> None:
    types = {"x": f32(BATCH, SEQ, 8), "weight": f32(8)}
    check(types, lambda x, w: RMSNormOp(x, w, epsilon=1e-5, offset=offset), target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_norms_without_weight(target: Target, tmp_path: Path) -> None:
    types = {"x": f32(BATCH, SEQ, 8)}
    check(dict(types), lambda x: RMSNormOp(x, None, epsilon=1e-5), target, tmp_path / "rms")
    check(dict(types), lambda x: LayerNormOp(x, None, None, epsilon=1e-5), target, tmp_path / "layer")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("rows", [BATCH, 1], ids=["batch", "one"])
def test_rotary(rows: Any, rotated: int, interleaved: bool, target: Target, tmp_path: Path) -> None:
    types = {"x": f32(BATCH, 4, SEQ, 8), "cos": f32(rows, SEQ, rotated), "sin": f32(rows, SEQ, rotated)}
    check(types, lambda x, c, s: RotaryOp(x, c, s, interleaved=interleaved), target, tmp_path)


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("same", [True, False])
def test_rotary_operator(same: bool, rotated: int, tmp_path: Path) -> None:
    """The operator takes half of cos and sin: it is used when the other half is known to be equal, and only then."""
    function = FuncOp.build("main", [f32(BATCH, 4, SEQ, 8), f32(BATCH, SEQ, rotated // 2)], arg_names=["x", "angles"])
    x, angles = function.arguments
    other = angles if same else _add(function, "neg.default", {"self": angles}, rotated // 2)
    both = _add(function, "cat.default", {"tensors": (angles, other)}, rotated, dim=-1)
    cos, sin = (_add(function, f"{name}.default", {"self": both}, rotated) for name in ("cos", "sin"))
    rotary = RotaryOp(x, _add(function, "mul.Scalar", {"self": cos}, rotated, other=1.5), sin)
    function.body.append(rotary)
    function.finish([rotary.y], ["y"])
    module = module_of(ModuleOp.build([function]))
    feeds = {"x": torch.randn(2, 4, 3, 8), "angles": torch.randn(2, 3, rotated // 2)}
    found, _ = emit_and_run(module, feeds, tmp_path, target=Target.ORT_CPU)
    assert_close(found["y"], reference(module, feeds)["y"])
    nodes = [node.op_type for node in onnx.load(str(tmp_path / MODEL_FILE)).graph.node]
    assert ("RotaryEmbedding" in nodes) == same


def _add(function: FuncOp, name: str, tensors: dict[str, Any], width: int, **arguments: Any) -> Value:
    op = aten.build(name, tensors, (f32(BATCH, SEQ, width),), **arguments)
    function.body.append(op)
    return op.result


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"chunk": 3}], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("past", [True, False])
def test_attention_mask(past: bool, causal: bool, options: dict[str, int], tmp_path: Path) -> None:
    keys = PAST + SEQ if past else SEQ
    length = 7 if past else 3
    padding = torch.ones(2, length, dtype=torch.int64)
    padding[0, :2] = 0
    padding[1, -1] = 0
    result = TensorType((BATCH, 1, SEQ, keys), DType.I1)

    def make(value: Value) -> Operation:
        return AttentionMaskOp(value, causal=causal, result_types=[result], **options)

    types = {"padding": TensorType((BATCH, keys), DType.I64)}
    check(types, make, Target.PORTABLE, tmp_path, padding=padding)


ATTENTION = [
    {},
    {"heads": 2, "key_heads": 2},
    {"past": True},
    {"mask": "boolean"},
    {"mask": "boolean", "past": True},
    {"mask": "additive", "heads": 6},
    {"mask": "boolean", "softcap": 5.0},
    {"sinks": True, "mask": "boolean"},
    {"sinks": True, "past": True, "heads": 2, "key_heads": 2},
    {"value_width": 5, "past": True, "mask": "boolean"},
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case: dict[str, Any], target: Target, tmp_path: Path) -> None:
    heads, key_heads = case.get("heads", 4), case.get("key_heads", 2)
    width, value_width = 8, case.get("value_width", 8)
    keys = PAST + SEQ if case.get("past") else SEQ
    total = 7 if case.get("past") else 3
    types = {
        "query": f32(BATCH, heads, SEQ, width),
        "key": f32(BATCH, key_heads, SEQ, width),
        "value": f32(BATCH, key_heads, SEQ, value_width),
    }
    given = {}
    if case.get("mask") == "boolean":
        types["mask"] = TensorType((BATCH, 1, SEQ, keys), DType.I1)
        given["mask"] = torch.rand(2, 1, 3, total, generator=torch.Generator().manual_seed(1)) < 0.6
        given["mask"][..., -1] = True
    elif case.get("mask") == "additive":
        types["mask"] = f32(1, heads, SEQ, keys)
    if case.get("sinks"):
        types["sinks"] = f32(heads)
    if case.get("past"):
        types["past_key"] = f32(BATCH, key_heads, PAST, width)
        types["past_value"] = f32(BATCH, key_heads, PAST, value_width)
    names = list(types)

    def make(*values: Value) -> Operation:
        named = dict(zip(names, values, strict=True))
        order = ("query", "key", "value", "mask", "sinks", "past_key", "past_value")
        return AttentionOp(*[named.get(name) for name in order], scale=0.3, softcap=case.get("softcap", 0.0))

    check(types, make, target, tmp_path, **given)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_any_key_are_finite(sinks: bool, tmp_path: Path) -> None:
    """As padding tokens have: their values do not matter, but NaN would spread."""
    types = {name: f32(BATCH, 2, SEQ, 4) for name in ("query", "key", "value")}
    types["mask"] = TensorType((BATCH, 1, SEQ, SEQ), DType.I1)
    if sinks:
        types["sinks"] = f32(2)
    module = module_of(one_operation(types, lambda *values: AttentionOp(*values, scale=0.5)))
    feeds = {name: torch.randn(kind.evaluate(SIZES)) for name, kind in types.items()}
    feeds["mask"] = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    found, _ = emit_and_run(module, feeds, tmp_path)
    assert np.isfinite(found["y0"]).all()
    if sinks:
        assert not found["y0"].any()
