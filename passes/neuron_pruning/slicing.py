"""Experts, and layers of experts, with some of their neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moec.experts import (
    Constant,
    Dense,
    Expert,
    FeedForward,
    LowRank,
    MoeLayer,
    Projection,
    UnreadableExpertError,
    alias_experts,
    load_dense,
    load_expert,
    replace_experts,
)
from moec.experts.dense import DenseLayer
from moec.pipeline.base import PassContext
from moec.weights.context import WeightContext


def cut_layer(layer: MoeLayer, weights: WeightContext, keep: Mapping[int, torch.Tensor]) -> MoeLayer:
    """The layer with only the neurons `keep` (i64) of some stored experts.

    An expert without neurons becomes its bias, a constant; one without a bias becomes nothing, and its router outputs
    then name no expert.
    """
    new: dict[int, Expert] = {}
    empty = set()
    for number, neurons in keep.items():
        expert = load_expert(layer, weights, number)
        assert isinstance(expert, FeedForward)
        if neurons.numel():
            new[number] = slice_neurons(expert, neurons)
        elif expert.down.bias is not None:
            new[number] = Constant(expert.down.bias, expert.loaded)
        else:
            empty.add(number)
    layer = replace_experts(layer, weights, new)
    if not empty:
        return layer
    return alias_experts(layer, [-1 if expert in empty else expert for expert in layer.stored])


def load_sliceable(layer: DenseLayer, context: PassContext, pass_name: str) -> FeedForward | None:
    """A dense block whose neurons can be cut; None, with a refusal, for another one."""
    try:
        block = load_dense(layer, context.require_weights())
    except UnreadableExpertError as error:
        context.refuse(layer.op, error.message, pass_name)
        return None
    problem = slicing_problem(block)
    if problem:
        context.refuse(layer.op, problem, pass_name)
        return None
    return block


def slicing_problem(expert: Expert) -> str:
    """Why the neurons of an expert cannot be cut, in words; empty where they can."""
    if not isinstance(expert, FeedForward):
        return "it has no neurons"
    for name, projection in (("gate", expert.gate), ("up", expert.up), ("down", expert.down)):
        if projection is None or isinstance(projection.matrix, Dense):
            continue
        matrix = projection.matrix
        if not isinstance(matrix, LowRank):
            return f"its {name} matrix is partly factored; prune neurons first, then factor"
        if matrix.base is not None:
            return f"its {name} matrix has a base that other experts share"
        if matrix.right_is_shared if name == "down" else matrix.left_is_shared:
            return f"its {name} matrix has a factor of all neurons that other experts share"
    return ""


def slice_neurons(expert: FeedForward, keep: torch.Tensor) -> FeedForward:
    """The expert with the neurons `keep` (indices i64, in this order); tensors without an axis of neurons are the same.

    All of them in order give the expert itself. It must be one without a `slicing_problem`.
    """
    if torch.equal(keep, torch.arange(expert.width)):
        return expert
    gate = None if expert.gate is None else _rows(expert.gate, keep)
    return replace(expert, gate=gate, up=_rows(expert.up, keep), down=_columns(expert.down, keep))


def _rows(projection: Projection, keep: torch.Tensor) -> Projection:
    matrix = projection.matrix
    bias = None if projection.bias is None else projection.bias[keep]
    if isinstance(matrix, LowRank):
        return Projection(replace(matrix, left=matrix.left[keep]), bias)
    return Projection(Dense(matrix.dense()[keep]), bias)


def _columns(projection: Projection, keep: torch.Tensor) -> Projection:
    matrix = projection.matrix
    if isinstance(matrix, LowRank):
        return replace(projection, matrix=replace(matrix, right=matrix.right[:, keep]))
    return replace(projection, matrix=Dense(matrix.dense()[:, keep]))
