"""Finds where two exported models differ: which layer, which tensor, which node. Runs only when a comparison failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from moec.artifact.summary import layer_of

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Difference:
    """The first thing in which two models differ: `what` in words, the layer and the tensor or node that it is in."""

    what: str
    layer: str
    tensor: str

    @property
    def where(self) -> str:
        """Layer and tensor in one phrase."""
        return f"{self.layer or 'outside of the layers'}, {self.tensor}"


def first_difference(actual: Path, expected: Path) -> Difference | None:
    """Compares two ONNX files with their external data: nodes in order, then tensors by name. None if equal."""
    try:
        ours = onnx_ir.load(actual)
    except Exception as error:  # protobuf, onnx_ir and the file system each have their own
        return Difference(f"the graph cannot be read ({type(error).__name__}: {error})", "", actual.name)
    theirs = onnx_ir.load(expected)
    return _differing_node(ours, theirs) or _differing_tensor(ours, theirs)


def _differing_node(ours: onnx_ir.Model, theirs: onnx_ir.Model) -> Difference | None:
    for mine, other in zip(ours.graph.all_nodes(), theirs.graph.all_nodes(), strict=False):
        if _describe(mine) != _describe(other):
            name = other.name or ""
            return Difference(f"node {mine.op_type} differs from {other.op_type}", _layer_near(other), f"node {name}")
    counts = [sum(1 for _ in model.graph.all_nodes()) for model in (ours, theirs)]
    if counts[0] != counts[1]:
        return Difference(f"the graph has {counts[0]} nodes instead of {counts[1]}", "", "the graph")
    return None


def _differing_tensor(ours: onnx_ir.Model, theirs: onnx_ir.Model) -> Difference | None:
    for name, value in theirs.graph.initializers.items():
        mine = ours.graph.initializers.get(name)
        if mine is None or mine.const_value is None or value.const_value is None:
            return Difference("a tensor is missing", layer_of(name), name)
        left, right = mine.const_value, value.const_value
        if tuple(left.shape) != tuple(right.shape) or left.dtype != right.dtype:
            return Difference("a tensor has another shape or type", layer_of(name), name)
        place = _first_unequal(left, right)
        if place is not None:
            return Difference(f"a tensor differs from element {place} on", layer_of(name), name)
    return None


def _first_unequal(left: onnx_ir.TensorProtocol, right: onnx_ir.TensorProtocol) -> int | None:
    start = 0
    for a, b in zip(_pieces(left), _pieces(right), strict=True):
        unequal = np.flatnonzero(a != b)
        if len(unequal):
            return (start + int(unequal[0])) // max(int(left.dtype.itemsize), 1)
        start += len(a)
    return None


def _pieces(tensor: onnx_ir.TensorProtocol) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor, a few MiB at a time; external data is mapped and not read at once."""
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK]


def _describe(node: onnx_ir.Node) -> tuple[object, ...]:
    inputs = tuple(value.name if value is not None else "" for value in node.inputs)
    attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
    return node.domain, node.op_type, inputs, attributes


def _layer_near(node: onnx_ir.Node) -> str:
    """The layer of a node: from its own name, else from the first weight among its inputs."""
    names = [node.name or "", *(value.name or "" for value in node.inputs if value is not None)]
    return next((layer_of(name) for name in names if layer_of(name)), "")
