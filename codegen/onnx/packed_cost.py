"""Predicted seconds of layers with packed experts, as `cost_model` for those in float32.

The constants were measured with onnxruntime 1.31 on one thread of an AVX-512 core (`python -m
tests.benchmarks.packed_experts`), 4 bits in groups of 32. One token uses kernels for single rows; with more, an expert
that is used is unpacked once, and each row adds its products.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.artifact.options import Activations
from moec.codegen.onnx.cost_model import Choice, ExpertsShape, Lowering

_LAYER, _LEAN_EXPERT, _FUSED_EXPERT = 20e-6, 5e-6, 0.3e-6
_DECODE = 2e-9
_MARGIN = 0.9


@dataclass(frozen=True)
class _PerWeight:
    """Seconds per weight of an expert: for the row of a single token; for many tokens, once and for each row."""

    single: float
    once: float
    row: float

    def seconds(self, weights: float, tokens: int, used: float, rows: float) -> float:
        """Of a layer whose experts have `weights` each, `used` of them for `rows` rows."""
        return weights * (rows * self.single if tokens == 1 else used * self.once + rows * self.row)


_LEAN = {
    Activations.FLOAT32: _PerWeight(100e-12, 250e-12, 13e-12),
    Activations.INT8: _PerWeight(50e-12, 31e-12, 12.5e-12),
}
_FUSED = {
    Activations.FLOAT32: _PerWeight(80e-12, 130e-12, 18e-12),
    Activations.INT8: _PerWeight(40e-12, 24e-12, 8.5e-12),
}


def predict_packed(shape: ExpertsShape, tokens: int, activations: Activations) -> dict[Lowering, float]:
    """Predicted seconds of one layer in products of each expert, and as the fused operator."""
    rows, used, weights = tokens * shape.slots, _used(shape, tokens), shape.matrix_elements
    lean = _LAYER + shape.experts * _LEAN_EXPERT + _LEAN[activations].seconds(weights, tokens, used, rows)
    fused = _LAYER + shape.experts * _FUSED_EXPERT + _FUSED[activations].seconds(weights, tokens, used, rows)
    return {Lowering.LEAN: lean, Lowering.LEAN_FUNCTION: lean, Lowering.FUSED_PACKED: fused}


def decoding_seconds(shape: ExpertsShape, tokens: int) -> float:
    """Predicted seconds of a layer whose experts are decoded when they are used."""
    return _LAYER + _used(shape, tokens) * shape.matrix_elements * _DECODE


def _used(shape: ExpertsShape, tokens: int) -> float:
    """How many experts some token chooses, if the router prefers none."""
    return shape.experts * (1 - (1 - min(1.0, shape.slots / shape.experts)) ** tokens)


def choose_packed(
    shape: ExpertsShape, tokens: int, activations: Activations, lean: Lowering, refusal: str | None
) -> Choice:
    """The form for a layer that operators can take packed. `refusal`: why the fused one cannot, None where it can."""
    seconds = predict_packed(shape, tokens, activations)
    if refusal is not None:
        return Choice(lean, f"products of packed weights; not the fused operator: {refusal}", {lean: seconds[lean]})
    kept = {form: seconds[form] for form in (lean, Lowering.FUSED_PACKED)}
    ratio = seconds[Lowering.FUSED_PACKED] / seconds[lean]
    reason = f"com.microsoft::QMoE is predicted to take {ratio:.2f} of the time of products of packed weights"
    return Choice(Lowering.FUSED_PACKED if ratio < _MARGIN else lean, f"{reason} for {tokens} tokens", kept)
