"""The gate before a fused operator is used: its kernel against the portable body, on random tokens.

The layer's attributes, number of experts and slots are those of the model; its matrices are small, since no trap of the
operator depends on their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from moec.codegen.onnx.expert_form import Activation
from moec.codegen.onnx.experts_fused import ABSENT
from moec.codegen.onnx.fallback_function import OPERATOR, FallbackForm, fallback_function
from moec.codegen.onnx.graph import MICROSOFT, GraphBuilder
from moec.codegen.onnx.targets import TargetProfile
from moec.ir.types import DType

TOKEN_COUNTS = (1, 7, 33)
HIDDEN, WIDTH = 48, 32
TOLERANCE = 1e-5
_BODY_DOMAIN = "moec.body"


@dataclass(frozen=True)
class NodeSignature:
    """All that the operator's arithmetic depends on but sizes of matrices."""

    form: FallbackForm
    experts: int
    attributes: tuple[tuple[str, int | float | str], ...]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(dict(self.attributes)["k"])


@dataclass(frozen=True)
class ParityResult:
    """The largest difference relative to the largest output; `problem` where the node did not run or differs."""

    difference: float
    problem: str | None = None


@lru_cache(maxsize=256)
def check_parity(signature: NodeSignature, profile: TargetProfile) -> ParityResult:
    """Runs the node by ONNX Runtime's kernel and by the fallback's body.

    Routings: random, every token to the same experts (all others empty), and tokens without any expert.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        Fail,
        InvalidArgument,
        InvalidGraph,
        InvalidProtobuf,
    )
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_

    generator = np.random.default_rng(0)
    weights = _weights(signature, generator)
    try:
        kernel = _session(signature, profile, weights, MICROSOFT)
        body = _session(signature, profile, weights, _BODY_DOMAIN)
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NotImplemented_) as error:
        return ParityResult(float("inf"), f"the operator does not load: {str(error).splitlines()[0][:200]}")
    worst = 0.0
    for tokens in TOKEN_COUNTS:
        x = generator.standard_normal((tokens, HIDDEN)).astype(np.float32)
        for gates in _routings(signature, tokens, generator):
            with np.errstate(divide="ignore"):
                logits = np.where(gates > 0, np.log(gates), np.float32(ABSENT)).astype(np.float32)
            total = gates.sum(1, keepdims=True)
            feeds = {"x": x, "logits": logits}
            found, expected = (session.run(None, feeds)[0] * total for session in (kernel, body))
            scale = max(float(np.abs(expected).max()), 1e-6)
            difference = float(np.abs(found - expected).max()) / scale
            worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    problem = None if worst <= TOLERANCE else f"kernel and portable body differ by {worst:.1e}"
    return ParityResult(worst, problem)


def _routings(
    signature: NodeSignature, tokens: int, generator: np.random.Generator
) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    experts, top_k = signature.experts, signature.top_k
    random = np.zeros((tokens, experts), np.float32)
    for row in random:
        row[generator.permutation(experts)[:top_k]] = generator.uniform(1e-6, 2.5, top_k)
    same = np.zeros((tokens, experts), np.float32)
    same[:, experts - top_k :] = generator.uniform(0.1, 1.0, top_k)
    none = random.copy()
    none[:: max(1, tokens // 3)] = 0.0
    return [random, same, none]


def _weights(
    signature: NodeSignature, generator: np.random.Generator
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    rows = 2 * WIDTH if signature.form.activation is Activation.SWIGLU else WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "fc1": (signature.experts, rows, HIDDEN),
        "fc2": (signature.experts, HIDDEN, WIDTH),
    }
    if signature.form.has_bias:
        shapes.update(fc1_bias=(signature.experts, rows), fc2_bias=(signature.experts, HIDDEN))
    # large enough that limits of the activation act
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _session(
    signature: NodeSignature,
    profile: TargetProfile,
    weights: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
    domain: str,
) -> Any:
    import onnxruntime

    b = GraphBuilder(profile.opset)
    x = b.input("x", DType.F32, ["tokens", HIDDEN])
    logits = b.input("logits", DType.F32, ["tokens", signature.experts])
    values = {name: b.constant(array) for name, array in weights.items()}
    inputs = (values.get(name) for name in ("fc1", "fc1_bias", "fc2", "fc2_bias"))
    y = b.op(OPERATOR, x, logits, *inputs, domain=domain, **dict(signature.attributes))
    b.output(y, "y", DType.F32, ["tokens", HIDDEN])
    function = fallback_function(profile.opset, signature.form)
    function.domain = domain
    graph = ir.Graph(
        b.inputs,
        b.outputs,
        nodes=b.nodes,
        initializers=b.initializers,
        opset_imports={"": profile.opset, domain: 1},
        name="parity",
    )
    model: onnx.ModelProto = ir.to_proto(ir.Model(graph, ir_version=profile.ir_version, functions=[function]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
