"""The gate before `com.microsoft::QMoE` is used: its kernel against the decoded weights, on random tokens and gates."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from moec.codegen.onnx.experts_packed_fused import OPERATOR
from moec.codegen.onnx.graph import MICROSOFT, GraphBuilder
from moec.codegen.onnx.parity import TOKEN_COUNTS, TOLERANCE, ParityResult
from moec.codegen.onnx.targets import TargetProfile
from moec.ir.types import DType

INT8_TOLERANCE = 3e-2
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@lru_cache(maxsize=64)
def check_packed_parity(
    attributes: tuple[tuple[str, int | float | str], ...],
    experts: int,
    has_zeros: bool,
    has_bias: bool,
    profile: TargetProfile,
) -> ParityResult:
    """Runs the node with these attributes on small matrices; `problem` where it does not load or differs."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_

    given = dict(attributes)
    generator = np.random.default_rng(0)
    bits, block, top_k = int(given["expert_weight_bits"]), int(given["block_size"]), int(given["k"])
    layers = [
        _Matrices(generator, experts, rows, columns, bits, block, has_zeros, has_bias)
        for rows, columns in ((2 * block, 2 * block), (2 * block, block))
    ]
    try:
        session = _session(given, layers, experts, profile)
    except (Fail, InvalidArgument, InvalidGraph, NotImplemented_) as error:
        return ParityResult(float("inf"), f"the operator does not load: {str(error).splitlines()[0][:200]}")
    worst = 0.0
    for tokens in TOKEN_COUNTS:
        x = generator.standard_normal((tokens, 2 * block)).astype(np.float32)
        gates = np.zeros((tokens, experts), np.float32)
        for row in gates:
            row[generator.permutation(experts)[:top_k]] = generator.uniform(1e-4, 2.5, top_k)
        gates[:: max(2, tokens // 3)] = 0.0
        found = session.run(None, {"x": x, "gates": gates})[0]
        expected = _expected(x, gates, layers, given)
        scale = max(float(np.abs(expected).max()), 1e-6)
        difference = float(np.abs(found - expected).max()) / scale
        worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    exact = bits == 4 and given["accuracy_level"] == 0
    problem = None
    if worst > (TOLERANCE if exact else INT8_TOLERANCE):
        problem = f"kernel and decoded weights differ by {worst:.1e}"
    return ParityResult(worst, problem)


class _Matrices:
    """Random packed matrices [experts, rows, columns], as operands and as numbers."""

    def __init__(
        self,
        generator: np.random.Generator,
        experts: int,
        rows: int,
        columns: int,
        bits: int,
        block: int,
        has_zeros: bool,
        has_bias: bool,
    ) -> None:
        codes = generator.integers(0, 1 << bits, (experts, rows, columns)).astype(np.uint8)
        groups = columns // block
        zeros = generator.integers(0, 1 << bits, (experts, rows, groups)).astype(np.uint8)
        self.scales = (generator.uniform(0.5, 1.5, (experts, rows, groups)) / columns / (1 << bits)).astype(np.float32)
        self.codes, self.zeros = _packed(codes, bits), _packed(zeros, bits) if has_zeros else None
        middle = zeros if has_zeros else np.full_like(zeros, 1 << (bits - 1))
        blocks = codes.reshape(experts, rows, groups, block).astype(np.float64) - middle[..., None]
        self.dense = (blocks * self.scales[..., None]).reshape(experts, rows, columns)
        self.bias = generator.standard_normal((experts, rows)).astype(np.float32) * 0.1 if has_bias else None


def _packed(codes: Array, bits: int) -> Array:
    each = 8 // bits
    padded = np.pad(codes, [(0, 0), (0, 0), (0, -codes.shape[-1] % each)])
    split = padded.reshape(*codes.shape[:-1], -1, each)
    joined: Array = (split << (bits * np.arange(each, dtype=np.uint8))).sum(-1).astype(np.uint8)
    return joined


def _expected(x: Array, gates: Array, layers: list[_Matrices], given: dict[str, Any]) -> Array:
    y = np.zeros((len(x), layers[1].dense.shape[1]))
    limit = given.get("swiglu_limit")
    for token, expert in zip(*np.nonzero(gates), strict=True):
        z = layers[0].dense[expert] @ x[token] + (0 if layers[0].bias is None else layers[0].bias[expert])
        gate, up = z[0::2], z[1::2]
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        hidden = gate / (1 + np.exp(-given["activation_alpha"] * gate)) * (up + given["activation_beta"])
        result = layers[1].dense[expert] @ hidden + (0 if layers[1].bias is None else layers[1].bias[expert])
        y[token] += gates[token, expert] * result
    return y


def _session(given: dict[str, Any], layers: list[_Matrices], experts: int, profile: TargetProfile) -> Any:
    import onnxruntime

    b = GraphBuilder(profile.opset)
    hidden = layers[1].dense.shape[1]
    x = b.input("x", DType.F32, ["tokens", hidden])
    gates = b.input("gates", DType.F32, ["tokens", experts])
    inputs: list[ir.Value | None] = [x, gates]
    for layer in layers:
        inputs += [b.constant(layer.codes), b.constant(layer.scales)]
        inputs.append(None if layer.bias is None else b.constant(layer.bias))
    zeros = [None if layer.zeros is None else b.constant(layer.zeros) for layer in layers]
    y = b.op(OPERATOR, *inputs, None, None, None, *zeros, None, gates, domain=MICROSOFT, **given)
    b.output(y, "y", DType.F32, ["tokens", hidden])
    opsets = {"": profile.opset, MICROSOFT: 1}
    graph = ir.Graph(b.inputs, b.outputs, nodes=b.nodes, initializers=b.initializers, opset_imports=opsets, name="p")
    model: onnx.ModelProto = ir.to_proto(ir.Model(graph, ir_version=profile.ir_version))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
