"""Expert layers alone against what the machine allows: `python -m tests.benchmarks.expert_stack`.

Four residual layers of 32 experts (hidden 1024, width 1408, top-4) without attention, on one thread: decoding beside
the time to read the weights that a token needs, 512 tokens beside two dense feed-forward stacks of as many FLOPs, all
compiled by moec, and beside torch's grouped product in transformers' own block. Rounds take turns, tokens are fresh,
the table shows medians of CPU seconds.

The dense stacks: one whose layers are `top_k` times as wide as an expert, and one as wide as an expert that gets
`top_k` rows for every token, which are the rows that all experts together compute.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moec.codegen.onnx.emit import MODEL_FILE, emit_onnx
from moec.codegen.onnx.targets import Target
from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.ir import DType, TensorType, Value
from moec.module import Module, SourceFacts
from moec.weights.context import WeightContext
from tests.benchmarks.expert_layers import TOKENS, LayerShape, moe_layers
from tests.benchmarks.machine import MachineLimits, cpu_seconds

SHAPE = LayerShape(experts=32, hidden=1024, width=1408, top_k=4, layers=4)
TOKEN_COUNTS = (1, 16, 128, 512)
PORTABLE, ORT_CPU, TORCH = "moec portable", "moec ort-cpu", "torch grouped_mm"
WIDE, ROWS = "dense, k times as wide", "dense, k times the rows"

Rows = NDArray[np.float32]
Call = Callable[[Rows], Rows]


@dataclass
class StackTimes:
    """Seconds per call by (subject, tokens), and the machine's limits in the same rounds."""

    shape: LayerShape
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    limits: MachineLimits = field(default_factory=MachineLimits)

    def median(self, subject: str, tokens: int) -> float:
        return median(self.seconds[subject, tokens])

    @property
    def decode_bound(self) -> float:
        """Seconds in which the weights that one token needs can be read."""
        router = 4 * self.shape.experts * self.shape.hidden
        nbytes = self.shape.layers * (router + self.shape.top_k * self.shape.expert_bytes)
        return nbytes / self.limits.bytes_per_second

    def decode_ratio(self, subject: str) -> float:
        """Time of one token over the bandwidth bound."""
        return self.median(subject, 1) / self.decode_bound

    def prefill_ratio(self, subject: str, dense: str = WIDE) -> float:
        """Time of 512 tokens over that of a dense stack."""
        return self.median(subject, 512) / self.median(dense, 512)

    def prefill_bound_ratio(self, subject: str) -> float:
        """Time of 512 tokens over that of the wide stack and of reading the weights that the wide stack has not.

        512 tokens reach all experts, whose weights are `experts / top_k` times those of a dense layer of as many FLOPs.
        """
        more = self.shape.layers * (self.shape.experts - self.shape.top_k) * self.shape.expert_bytes
        return self.median(subject, 512) / (self.median(WIDE, 512) + more / self.limits.bytes_per_second)


def dense_layers(hidden: int, width: int, layers: int) -> Module:
    """x [batch, hidden] -> x + down(silu(gate(x)) * up(x)), `layers` times, with random weights."""
    generator = torch.Generator().manual_seed(1)
    function = FuncOp.build("main", [_f32(TOKENS, hidden)], arg_names=["x"])
    tensors: dict[str, torch.Tensor] = {}

    def linear(value: Value, name: str, outputs: int, inputs: int) -> Value:
        tensors[name] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        weight = WeightOp(result_types=[_f32(outputs, inputs)], weight_name=name, source=name)
        function.body.append(weight)
        return add("linear.default", {"input": value, "weight": weight.value}, outputs)

    def add(name: str, tensors: dict[str, Value], size: int) -> Value:
        op = aten.build(name, tensors, (_f32(TOKENS, size),))
        function.body.append(op)
        return op.result

    value: Value = function.arguments[0]
    for layer in range(layers):
        gate = add("silu.default", {"self": linear(value, f"{layer}.gate", width, hidden)}, width)
        up = linear(value, f"{layer}.up", width, hidden)
        product = add("mul.Tensor", {"self": gate, "other": up}, width)
        down = linear(product, f"{layer}.down", hidden, width)
        value = add("add.Tensor", {"self": value, "other": down}, hidden)
    function.finish([value], ["y"])
    return Module(ModuleOp.build([function]), WeightContext(in_memory=tensors), SourceFacts("module"))


def _f32(*shape: object) -> TensorType:
    return TensorType(tuple(shape), DType.F32)  # type: ignore[arg-type]


def onnx_call(module: Module, target: Target, folder: Path) -> Call:
    """Emits a module and loads it for one thread."""
    emit_onnx(module, folder, target=target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    return lambda x: np.asarray(session.run(None, {"x": x})[0])


def torch_call(module: Module, shape: LayerShape) -> Call:
    """The same layers as blocks of Mixtral in transformers, with its grouped product."""
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    blocks = []
    for layer in range(shape.layers):
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)
        names = {"gate.weight": "router", "experts.gate_up_proj": "gate_up", "experts.down_proj": "down"}
        state = {name: module.weights.load(f"layers.{layer}.{ours}") for name, ours in names.items()}
        block.load_state_dict(state, assign=True)
        blocks.append(block.eval())

    def call(x: Rows) -> Rows:
        value = torch.from_numpy(x)[None]
        with torch.no_grad():
            for block in blocks:
                value = value + block(value)
        return value[0].numpy()

    return call


def measure(rounds: int, shape: LayerShape = SHAPE) -> StackTimes:
    """Compiles, checks that all three forms of the experts agree, and runs `rounds` rounds after one to warm up."""
    torch.set_num_threads(1)
    times = StackTimes(shape)
    with tempfile.TemporaryDirectory() as scratch:
        module = moe_layers(shape)
        calls = {
            PORTABLE: onnx_call(module, Target.PORTABLE, Path(scratch, "portable")),
            ORT_CPU: onnx_call(module, Target.ORT_CPU, Path(scratch, "ort-cpu")),
            WIDE: onnx_call(
                dense_layers(shape.hidden, shape.width * shape.top_k, shape.layers),
                Target.PORTABLE,
                Path(scratch, "wide"),
            ),
            ROWS: onnx_call(
                dense_layers(shape.hidden, shape.width, shape.layers), Target.PORTABLE, Path(scratch, "rows")
            ),
            TORCH: torch_call(module, shape),
        }
    generator = np.random.default_rng(0)
    x = generator.standard_normal((16, shape.hidden), dtype=np.float32)
    for name in (ORT_CPU, TORCH):
        expected = calls[PORTABLE](x)
        assert np.abs(calls[name](x) - expected).max() <= 1e-4 * np.abs(expected).max(), name
    for round_number in range(-1, rounds):
        for tokens in TOKEN_COUNTS:
            for name, call in calls.items():
                rows = tokens * shape.top_k if name == ROWS else tokens
                x = generator.standard_normal((rows, shape.hidden), dtype=np.float32)
                seconds = cpu_seconds(lambda call=call, x=x: call(x))
                if round_number >= 0:
                    times.seconds.setdefault((name, tokens), []).append(seconds)
        times.limits.measure()
    return times


def table(times: StackTimes) -> str:
    """Medians and ratios as text."""
    lines = [f"{'milliseconds per call':24}" + "".join(f"{f'{tokens} tokens':>12}" for tokens in TOKEN_COUNTS)]
    for name in (PORTABLE, ORT_CPU, WIDE, ROWS, TORCH):
        lines.append(f"{name:24}" + "".join(f"{times.median(name, tokens) * 1e3:12.2f}" for tokens in TOKEN_COUNTS))
    limits = times.limits
    lines.append(f"memory bandwidth {limits.bytes_per_second / 1e9:.1f} GB/s, ")
    lines[-1] += f"matrix products {limits.flops_per_second / 1e9:.1f} GFLOP/s"
    lines.append(f"reading what one token needs: {times.decode_bound * 1e3:.2f} ms")
    for name in (PORTABLE, ORT_CPU):
        over_torch = ", ".join(f"{times.median(name, n) / times.median(TORCH, n):.2f}" for n in TOKEN_COUNTS)
        lines.append(
            f"{name}: decode {times.decode_ratio(name):.2f} of the bandwidth bound, 512 tokens "
            f"{times.prefill_ratio(name):.2f} of the wide dense stack ({times.prefill_bound_ratio(name):.2f} with "
            f"reading all experts) and {times.prefill_ratio(name, ROWS):.2f} of the one with k times the rows, "
            f"over torch {over_torch}"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="Expert layers alone against the machine's limits, one thread.")
    parser.add_argument("--rounds", type=int, default=15)
    print(table(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
