"""Which form of `moe.experts` is fastest, from sizes, expected tokens and target.

The constants were measured on one thread of an AVX-512 server core with onnxruntime 1.31 (`python -m
tests.benchmarks.lowerings` prints prediction beside measurement). What decides is their ratio, not their size: the lean
form pays for every expert, used or not, but its products run on packed weights; the fused operator pays only for used
experts, but packs the weights of an expert anew whenever it has more than one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moec.codegen.onnx.targets import Target

# The number of experts from which a main graph may not grow with them, where a one-node form exists.
ONE_NODE_EXPERTS = 128
# The fused operator is taken where its time is below this multiple of the lean form's. Below ONE_NODE_EXPERTS the lean
# form is preferred, since longer inputs like it better; from there on the operator, which loads faster, maps its
# weights instead of copying them, and does not slow down with experts that are not used.
_MARGIN, _ONE_NODE_MARGIN = 0.9, 1.1

# Activations expert by expert find their rows in the cache, at the price of two more nodes per expert, used or not.
_EACH_EXPERT, _EACH_SHARE = 0.8e-6, 0.03

# Seconds that merging a token's slots with the same expert takes, for few tokens; what it saves is rows of products.
MERGED_SLOTS = 12e-6

_LEAN_LAYER, _LEAN_EXPERT, _LEAN_ROW = 15e-6, 0.82e-6, 0.6e-6
_FUSED_LAYER, _FUSED_EXPERT, _FUSED_ROW = 12e-6, 0.5e-6, 1.5e-6
_READ = 28e9
_FUSED_READ_ONE_ROW = 24e9
_FUSED_READ_MANY_ROWS = 12.6e9
_MULTIPLY = 138e9


class Lowering(Enum):
    """A form of `moe.experts` in ONNX."""

    LEAN = "lean"
    LEAN_FUNCTION = "lean-function"
    FUSED = "fused"
    FUSED_PACKED = "fused-packed"


@dataclass(frozen=True)
class ExpertsShape:
    """What the time of a layer depends on. `matrix_elements` is the number of weights of one expert (their mean)."""

    experts: int
    slots: int
    matrix_elements: float


@dataclass(frozen=True)
class Choice:
    """A lowering, why it was chosen, and the predicted seconds of each form that could have been."""

    lowering: Lowering
    reason: str
    seconds: dict[Lowering, float]


def predict(shape: ExpertsShape, tokens: int) -> dict[Lowering, float]:
    """Predicted seconds of one layer for a run of `tokens` tokens, weights in float32, one thread."""
    rows = tokens * shape.slots
    share = min(1.0, shape.slots / shape.experts)
    used = shape.experts * (1 - (1 - share) ** tokens)
    one_row = min(used, shape.experts * tokens * share * (1 - share) ** (tokens - 1))
    nbytes = 4 * shape.matrix_elements
    multiply = multiplication_seconds(rows, shape.matrix_elements)
    lean = _LEAN_LAYER + shape.experts * _LEAN_EXPERT + rows * _LEAN_ROW + used * nbytes / _READ + multiply
    fused = _FUSED_LAYER + used * _FUSED_EXPERT + rows * _FUSED_ROW + multiply
    fused += one_row * nbytes / _FUSED_READ_ONE_ROW + (used - one_row) * nbytes / _FUSED_READ_MANY_ROWS
    return {Lowering.LEAN: lean, Lowering.LEAN_FUNCTION: lean, Lowering.FUSED: fused}


def computes_each(experts: int, choice: Choice) -> bool:
    """Whether a layer is so large that its activations may cost two nodes for each of its `experts`."""
    return experts * _EACH_EXPERT <= _EACH_SHARE * min(choice.seconds.values())


def multiplication_seconds(rows: float, matrix_elements: float) -> float:
    """Predicted seconds of the products of `rows` rows with experts of so many weights."""
    return 2 * rows * matrix_elements / _MULTIPLY


def choose(shape: ExpertsShape, tokens: int, target: Target, refusal: str | None) -> Choice:
    """The form for a layer. `refusal` says why the fused operator cannot compute it, None where it can."""
    seconds = predict(shape, tokens)
    if not target.profile.contrib:
        kept = {Lowering.LEAN: seconds[Lowering.LEAN]}
        return Choice(Lowering.LEAN, f"the only form that the target {target.value} has", kept)
    one_node = shape.experts >= ONE_NODE_EXPERTS
    lean = Lowering.LEAN_FUNCTION if one_node else Lowering.LEAN
    note = f", in a function because of its {shape.experts} experts" if one_node else ""
    if refusal is not None:
        return Choice(lean, f"not the fused operator: {refusal}{note}", {lean: seconds[lean]})
    kept = {form: seconds[form] for form in (lean, Lowering.FUSED)}
    margin = _ONE_NODE_MARGIN if one_node else _MARGIN
    ratio = seconds[Lowering.FUSED] / seconds[lean]
    prediction = f"the fused operator is predicted to take {ratio:.2f} of the lean form's time for {tokens} tokens"
    return Choice(Lowering.FUSED if ratio < margin else lean, prediction + (note if ratio >= margin else ""), kept)
