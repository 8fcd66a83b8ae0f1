"""A layer of 4-bit experts against the same layer in float32: `python -m tests.benchmarks.packed_experts`.

32 experts, hidden 1024, width 1408, top-4, integers of 4 bits in groups of 32 and of 64 with zero points, on one
thread: as products of each expert (MatMulNBits) and as one node (QMoE), with float32 and with int8 activations. Rounds
take turns on fresh tokens; the table shows medians of CPU seconds, how much faster than float32 that is, and which
share of the memory's bandwidth decoding reaches. The bars are for decoding: with int8 activations for groups of 32,
which `quantize` takes by default, and with float32 ones for QMoE with groups of 64, whose kernel reads them faster.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from moec.artifact.options import Activations
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import Target
from moec.dialects.moe import Normalize, Routing
from moec.dialects.quant import Integer, Span, ZeroPoint, bits_per_weight
from tests.benchmarks.expert_layers import LayerShape, moe_layers
from tests.benchmarks.expert_stack import Call, onnx_call
from tests.benchmarks.machine import MachineLimits, cpu_seconds
from tests.codegen.packed_matrices import expert, experts_module
from tests.codegen.running import load, module_of

SHAPE = LayerShape(experts=32, hidden=1024, width=1408, top_k=4)
GROUPS = (32, 64)
TOKEN_COUNTS = (1, 16, 128)
FLOAT = "float32"
FORMS = [
    (group, activations, form)
    for group in GROUPS
    for activations in Activations
    for form in (Lowering.LEAN, Lowering.FUSED_PACKED)
]
BARS = {
    (32, Activations.INT8, Lowering.LEAN): 2.5,
    (32, Activations.INT8, Lowering.FUSED_PACKED): 3.0,
    (64, Activations.FLOAT32, Lowering.FUSED_PACKED): 3.0,
}


def format_of(group: int) -> Integer:
    """4 bits, with zero points."""
    return Integer(4, Span.GROUP, group, ZeroPoint.INTEGER)


def title(group: int, activations: Activations, form: Lowering) -> str:
    """What the table calls a form."""
    operator = "MatMulNBits" if form is Lowering.LEAN else "QMoE"
    return f"groups of {group}, {operator}, {activations.value} activations"


@dataclass
class PackedTimes:
    """Seconds per call by (subject, tokens), and the machine's limits in the same rounds."""

    shape: LayerShape
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    limits: MachineLimits = field(default_factory=MachineLimits)

    def median(self, subject: str, tokens: int) -> float:
        return median(self.seconds[subject, tokens])

    def speedup(self, subject: str, tokens: int = 1) -> float:
        """How many times as fast as the layer in float32."""
        return self.median(FLOAT, tokens) / self.median(subject, tokens)

    def bandwidth_share(self, subject: str, group: int = 0) -> float:
        """Bytes of the weights that one token needs, per second of decoding, over what one core can read.

        Weights have 4 bits in groups, or 32 without.
        """
        bits = bits_per_weight(format_of(group), self.shape.hidden, self.shape.width) if group else 32.0
        nbytes = self.shape.top_k * self.shape.expert_bytes * bits / 32
        return nbytes / self.median(subject, 1) / self.limits.bytes_per_second


def measure(rounds: int, shape: LayerShape = SHAPE) -> PackedTimes:
    """Compiles all forms, and runs `rounds` rounds after one to warm up."""
    torch.set_num_threads(1)
    times = PackedTimes(shape)
    generator = torch.Generator().manual_seed(0)
    routing = Routing(k=shape.top_k, normalize=Normalize.SUM)
    packed = {}
    for group in GROUPS:
        kinds = [format_of(group)] * 3
        members = [expert(kinds, shape.hidden, shape.width, generator) for _ in range(shape.experts)]
        packed[group] = module_of(*experts_module([members], shape.hidden, routing=routing))
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as scratch:
        calls[FLOAT] = onnx_call(moe_layers(shape), Target.ORT_CPU, Path(scratch, FLOAT))
        for group, activations, form in FORMS:
            folder = Path(scratch, f"{group} {activations.value} {form.value}")
            emit_onnx(packed[group], folder, target=Target.ORT_CPU, activations=activations, lowering=form)
            session = load(folder)
            calls[title(group, activations, form)] = lambda x, session=session: np.asarray(
                session.run(None, {"x": x})[0]
            )
    rows = np.random.default_rng(0)
    for number in range(-1, rounds):
        for tokens in TOKEN_COUNTS:
            for name, call in calls.items():
                x = rows.standard_normal((tokens, shape.hidden), dtype=np.float32)
                seconds = cpu_seconds(lambda call=call, x=x: call(x))
                if number >= 0:
                    times.seconds.setdefault((name, tokens), []).append(seconds)
        times.limits.measure()
    return times


def table(times: PackedTimes) -> str:
    """Medians, ratios to float32 and shares of the bandwidth as text."""
    lines = [f"{'milliseconds (times as fast as float32)':48}" + "".join(f"{f'{n} tokens':>17}" for n in TOKEN_COUNTS)]
    for name, group in ((FLOAT, 0), *[(title(*form), form[0]) for form in FORMS]):
        cells = [f"{times.median(name, n) * 1e3:9.2f} ({times.speedup(name, n):4.2f})" for n in TOKEN_COUNTS]
        share = f"  {times.bandwidth_share(name, group):.0%} of the bandwidth"
        lines.append(f"{name:48}" + "".join(f"{cell:>17}" for cell in cells) + share)
    lines.append(f"memory bandwidth of one core: {times.limits.bytes_per_second / 1e9:.1f} GB/s")
    return "\n".join(lines)


def missed(times: PackedTimes) -> list[str]:
    """The bars that are missed, in words."""
    return [
        f"{title(*form)}: {times.speedup(title(*form)):.2f} times float32, the bar is {bar}"
        for form, bar in BARS.items()
        if times.speedup(title(*form)) < bar
    ]


def main() -> int:
    """Prints the table; 1 where a bar is missed."""
    times = measure(rounds=25)
    print(table(times))
    for line in missed(times):
        print("MISSED", line)
    return int(bool(missed(times)))


if __name__ == "__main__":
    sys.exit(main())
