"""Reading and writing parts of tensors: slices with plain bounds, and writes into a tensor as concatenations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moec.errors import UnsupportedModelError
from moec.frontend.assembly import Assembly, overwrite, part_of, uninitialised
from moec.frontend.graph_importer import GraphImporter, Handler
from moec.frontend.graph_types import constant, node_type
from moec.ir import DimExpr, DType, TensorType, Value

Size = int | DimExpr

# An end beyond every size: Python's `x[start:]` is traced with the largest int64.
_END = 1 << 62


def _import_empty(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Assembly:
    return uninitialised(node_type(node, importer.sizes))


def _import_copy(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Value:
    """`copy(destination, source)`: the source, with the type of the destination."""
    value, kind = importer.value(arguments["src"]), node_type(node, importer.sizes)
    given = _type_of(value)
    if given.dtype is not kind.dtype:
        given = given.with_dtype(kind.dtype)
        value = importer.append_aten("_to_copy.default", {"self": value}, given, dtype=kind.dtype)
    if given.shape != kind.shape:
        value = importer.append_aten("expand.default", {"self": value}, kind, size=kind.shape)
    return value


def _import_slice(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Value | Assembly:
    """A slice with bounds counted from the start; one that takes everything is the tensor itself."""
    source, kind = node_type(arguments["self"], importer.sizes), node_type(node, importer.sizes)
    dim = int(arguments.get("dim", 0)) % source.rank
    start, stop = _bounds(importer, source.shape[dim], arguments)
    step = int(arguments.get("step", 1))
    given = importer.raw_value(arguments["self"])
    if isinstance(given, Assembly) and step == 1:
        whole = start == 0 and stop == source.shape[dim]
        part = given if whole else part_of(given, kind, dim, start, stop, importer.block, importer.location)
        if part is not None:
            return part
    value = importer.value(arguments["self"])
    if start == 0 and stop == source.shape[dim] and step == 1:
        return value
    return importer.append_aten("slice.Tensor", {"self": value}, kind, dim=dim, start=start, end=stop, step=step)


def _import_slice_scatter(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Assembly | Value:
    kind = node_type(node, importer.sizes)
    dim = int(arguments.get("dim", 0)) % kind.rank
    start, stop = _bounds(importer, kind.shape[dim], arguments)
    step = int(arguments.get("step", 1))
    if start == 0 and stop == kind.shape[dim] and step == 1:
        everything = importer.raw_value(arguments["src"])
        assert not isinstance(everything, tuple)
        return everything
    value = importer.value(arguments["src"])
    if step != 1:
        return _scatter_strided(importer, importer.value(arguments["self"]), value, dim, (start, stop, step))
    return _overwritten(importer, arguments["self"], value, dim, start, stop)


def _import_select_scatter(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Assembly:
    kind = node_type(node, importer.sizes)
    dim = int(arguments["dim"]) % kind.rank
    index = importer.attribute(arguments["index"])
    start: Size = kind.shape[dim] + index if isinstance(index, int) and index < 0 else index
    value = importer.value(arguments["src"])
    source = _type_of(value)
    wide = TensorType((*source.shape[:dim], 1, *source.shape[dim:]), source.dtype)
    value = importer.append_aten("unsqueeze.default", {"self": value}, wide, dim=dim)
    return _overwritten(importer, arguments["self"], value, dim, start, start + 1)


def _overwritten(
    importer: GraphImporter, base_node: fx.Node, value: Value, dim: int, start: Size, stop: Size
) -> Assembly:
    base = importer.raw_value(base_node)
    assert not isinstance(base, tuple)
    return overwrite(base, value, dim, start, stop, importer.block, importer.location)


def _scatter_strided(
    importer: GraphImporter, base: Value, value: Value, dim: int, bounds: tuple[Size, Size, int]
) -> Value:
    """Every n-th element from `value`, the others from the base: a fixed choice from both, one after the other."""
    kind = _type_of(base)
    size, added = kind.shape[dim], _type_of(value).shape[dim]
    start, stop, step = bounds
    known = isinstance(size, int) and isinstance(added, int) and isinstance(start, int) and isinstance(stop, int)
    if not known:
        raise UnsupportedModelError("the model writes every n-th element along an axis of any size")
    chosen = list(range(int(size)))  # type: ignore[arg-type]
    for position, index in enumerate(range(start, stop, step)):  # type: ignore[arg-type]
        chosen[index] = size + position  # type: ignore[assignment]
    both = TensorType((*kind.shape[:dim], size + added, *kind.shape[dim + 1 :]), kind.dtype)
    joined = importer.append_aten("cat.default", {"tensors": (base, value)}, both, dim=dim)
    indices = constant(torch.tensor(chosen), TensorType((len(chosen),), DType.I64), importer.location)
    tensors: dict[str, Value | tuple[Value, ...]] = {"self": joined, "index": importer.append(indices)}
    return importer.append_aten("index_select.default", tensors, kind, dim=dim)


def _bounds(importer: GraphImporter, size: Size, arguments: dict[str, Any]) -> tuple[Size, Size]:
    """Python's slice bounds as numbers from the start, within 0 and size where that can be told."""

    def bound(given: Any, default: Size) -> Size:
        at = importer.attribute(given)
        if at is None:
            return default
        assert isinstance(at, int | DimExpr)
        if not isinstance(at, int):
            return at
        if at < 0:
            moved = size + at
            return max(moved, 0) if isinstance(moved, int) else moved
        if at >= _END:
            return size
        return min(at, size) if isinstance(size, int) else at

    return bound(arguments.get("start"), 0), bound(arguments.get("end"), size)


def _type_of(value: Value) -> TensorType:
    kind = value.type
    assert isinstance(kind, TensorType)
    return kind


PART_HANDLERS: dict[str, Handler] = {
    "aten.empty.memory_format": _import_empty,
    "aten.new_empty.default": _import_empty,
    "aten.empty_like.default": _import_empty,
    "aten.copy.default": _import_copy,
    "aten.slice.Tensor": _import_slice,
    "aten.slice_scatter.default": _import_slice_scatter,
    "aten.select_scatter.default": _import_select_scatter,
}
