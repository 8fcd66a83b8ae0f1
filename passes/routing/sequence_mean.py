"""The mean over a sequence of what a router reads of each of its tokens."""

from __future__ import annotations

import torch

from moec.calibration.sample import LayerSample
from moec.dialects.builtin import ModuleOp
from moec.experts.layer import MoeLayer
from moec.ir import Operation, TensorType, Value
from moec.module import Module
from moec.passes.building import Builder
from moec.passes.matching import shape, tensor

_TOKENS_INPUT, _PADDING_INPUT = "input_ids", "attention_mask"


def sequence_obstacle(op: Operation, module: Module | None) -> str:
    """Why tokens of a sequence cannot share a choice, in words; empty where they can."""
    if not isinstance(op, ModuleOp):
        return "it is a choice of the whole model"
    if module is not None and module.source.kind == "decoder":
        return "a decoder chooses for its first token before it knows the others"
    names = op.main.arg_names
    if _TOKENS_INPUT not in names or len(shape(op.main.argument(_TOKENS_INPUT))) != 2:
        return f"the model has no input {_TOKENS_INPUT} of [batch, seq], which says where sequences end"
    return ""


def sequence_mean(op: ModuleOp | Operation, layer: MoeLayer) -> Value:
    """For each token the mean row of its sequence, padding left out, in front of the router and in its input's shape.

    The model must have no `sequence_obstacle`.
    """
    assert isinstance(op, ModuleOp)
    rows = layer.router.tensor("input")
    sizes, dtype = shape(rows), tensor(rows).dtype
    batch, length = shape(op.main.argument(_TOKENS_INPUT))
    build = Builder(lambda made: made.insert_before(layer.router))
    width = sizes[-1]
    wide = build.view(rows, (batch, length, width))
    if _PADDING_INPUT in op.main.arg_names:
        given = op.main.argument(_PADDING_INPUT)
        mask = build.aten("_to_copy.default", {"self": given}, TensorType((batch, length), dtype), dtype=dtype)
        mask = build.unsqueeze(mask, 2)
        kept = build.aten("mul.Tensor", {"self": wide, "other": mask}, TensorType((batch, length, width), dtype))
        count = _sum_over_tokens(build, mask, TensorType((batch, 1, 1), dtype))
        # a sequence of padding alone has no mean, and nobody reads what it gives
        count = build.aten("clamp_min.default", {"self": count}, TensorType((batch, 1, 1), dtype), min=1)
        total = _sum_over_tokens(build, kept, TensorType((batch, 1, width), dtype))
        mean = build.aten("div.Tensor", {"self": total, "other": count}, TensorType((batch, 1, width), dtype))
    else:
        kind = TensorType((batch, 1, width), dtype)
        mean = build.aten("mean.dim", {"self": wide}, kind, dim=(1,), keepdim=True, dtype=None)
    return build.view(build.expand(mean, (batch, length, width)), sizes)


def sequence_means(sample: LayerSample) -> torch.Tensor:
    """For each row of a sample the mean of what the router read of its sequence, over the rows that the sample has."""
    sequences = int(sample.sequence.max()) + 1
    rows = sample.router_input.double()
    total = torch.zeros(sequences, rows.shape[1], dtype=torch.float64).index_add_(0, sample.sequence, rows)
    counts = torch.bincount(sample.sequence, minlength=sequences).double().clamp(min=1)[:, None]
    return (total / counts)[sample.sequence].to(sample.router_input.dtype)


def _sum_over_tokens(build: Builder, value: Value, kind: TensorType) -> Value:
    return build.aten("sum.dim_IntList", {"self": value}, kind, dim=(1,), keepdim=True, dtype=None)
