"""Runs of the reference executor that comparisons need: the function with its layers, and each expert by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moec.artifact.summary import layer_of
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.dialects.builtin import FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import AttentionOp
from moec.ir import TensorType, Value
from moec.ir.equality import regions_equal
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.weights.context import WeightContext

OUTPUT = "output"


def run_with_taps(
    module: ModuleOp, weights: WeightContext, batch: TokenBatch, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """What `main` gives for a batch, at tokens that are not padding.

    `output` is its first result [tokens, ...]; every attention and every expert layer on the way is there by its name.
    """
    executor = Executor(module, weights, dtype=dtype)
    kept = torch.from_numpy(batch.mask).bool()
    values: dict[str, torch.Tensor] = {}
    counts = {"attention": 0}

    def tap(seen: Observation) -> None:
        if seen.expert is not None:
            return
        if isinstance(seen.op, ExpertsOp):
            values[layer_of_experts(seen.op)] = seen.results[0].reshape(*kept.shape, -1)[kept]
        elif isinstance(seen.op, AttentionOp):
            values[f"attention {counts['attention']}"] = seen.results[0].flatten(2)[kept]
            counts["attention"] += 1

    with torch.no_grad():
        results = executor.run(function_inputs(module.main, batch), observers=[tap])
    first = next(iter(results.values()))
    values[OUTPUT] = first[kept]
    return values


@dataclass(frozen=True)
class ExpertDifference:
    """A router output whose expert differs, and by how much of the largest value."""

    layer: str
    expert: int
    error: float


def same_experts(before: ModuleOp, after: ModuleOp) -> Iterator[tuple[ExpertsOp, ExpertsOp]]:
    """Pairs of expert layers that a pass changed but that answer to the same number of router outputs."""
    old = [op for op in before.walk() if isinstance(op, ExpertsOp)]
    new = [op for op in after.walk() if isinstance(op, ExpertsOp)]
    if len(old) != len(new):
        return
    for first, second in zip(old, new, strict=True):
        if len(first.stored) == len(second.stored) and not _same(first, second):
            yield first, second


def differing_expert(
    before: ExpertsOp, after: ExpertsOp, weights: WeightContext, bound: float, seed: int
) -> ExpertDifference | None:
    """The first router output whose expert gives something else for a random token, relative in float64; or None."""
    outputs = len(before.stored)
    hidden = _hidden_size(before)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(outputs, hidden, generator=generator, dtype=torch.float64)
    old = _each_expert(before, weights, tokens)
    new = _each_expert(after, weights, tokens)
    for index in range(outputs):
        scale = float(old[index].abs().max())
        error = float((new[index] - old[index]).abs().max())
        error = error / scale if scale else error
        if not error <= bound:
            return ExpertDifference(layer_of_experts(before), index, error)
    return None


def layer_of_experts(op: ExpertsOp) -> str:
    """The layer that an operation's first stack belongs to, such as `model.layers.3`."""
    for value in op.weights:
        if isinstance(value.defining_op, WeightOp):
            return layer_of(value.defining_op.weight_name) or value.defining_op.weight_name
    return "experts"


def _each_expert(op: ExpertsOp, weights: WeightContext, tokens: torch.Tensor) -> torch.Tensor:
    """[router outputs, H]: the expert of router output i on token i, with gate 1."""
    kinds = [value.type for value in (op.x, op.ids, op.gates)]
    function = FuncOp.build("main", kinds, arg_names=("x", "ids", "gates"))
    mapping: dict[Value, Value] = dict(zip((op.x, op.ids, op.gates), function.arguments, strict=True))
    for value in op.weights:
        if value not in mapping and value.defining_op is not None:
            function.body.append(value.defining_op.clone(mapping))
    copy = op.clone(mapping)
    function.body.append(copy)
    function.finish([copy.results[0]], ("y",))
    slots = kinds[1].shape[1] if isinstance(kinds[1], TensorType) else 1
    assert isinstance(slots, int)
    ids = torch.zeros(len(tokens), slots, dtype=torch.int64)
    gates = torch.zeros(len(tokens), slots, dtype=torch.float64)
    ids[:, 0] = torch.arange(len(tokens))
    gates[:, 0] = 1.0
    with torch.no_grad():
        executor = Executor(ModuleOp.build([function]), weights, dtype=torch.float64)
        return executor.run({"x": tokens, "ids": ids, "gates": gates})["y"]


def _hidden_size(op: ExpertsOp) -> int:
    size = op.x.type.shape[1] if isinstance(op.x.type, TensorType) else None
    assert isinstance(size, int)
    return size


def _same(first: ExpertsOp, second: ExpertsOp) -> bool:
    """Whether two expert layers are the same text: bodies, classes, and the sources of their weights."""
    sources = [
        [value.defining_op.source if isinstance(value.defining_op, WeightOp) else "" for value in op.weights]
        for op in (first, second)
    ]
    if sources[0] != sources[1] or first.stored != second.stored or first.classes != second.classes:
        return False
    return regions_equal(first, second)
