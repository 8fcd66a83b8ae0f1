"""Views of parameters as weights: `parameter.view(...)[:n]` becomes a weight expression, without operations."""

from __future__ import annotations

from typing import Any

from torch import fx

from moec.frontend.graph_types import arguments_by_name

_MAX_INDEX = (1 << 63) - 1


def parameter_behind(node: fx.Node) -> fx.Node | None:
    """The placeholder that a node is a view of, through operations that `view_expression` knows, or None."""
    while node.op == "call_function" and str(node.target) in _VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "placeholder" else None


def view_expression(node: fx.Node, source: str) -> str:
    """The weight expression of a node, given that of the placeholder that it is a view of."""
    if node.op == "placeholder":
        return source
    below = node.args[0]
    assert isinstance(below, fx.Node)
    inner = view_expression(below, source)
    arguments = arguments_by_name(node)
    name = str(node.target)
    if name == "aten.view.default":
        return _call("reshape", inner, node.meta["val"].shape)
    if name == "aten.permute.default":
        return _call("permute", inner, [dim % below.meta["val"].ndim for dim in arguments["dims"]])
    shape = below.meta["val"].shape
    dim = int(arguments.get("dim", 0)) % len(shape)
    start, stop, step = slice(
        arguments.get("start"), min(arguments.get("end") or _MAX_INDEX, _MAX_INDEX), arguments.get("step", 1)
    ).indices(int(shape[dim]))
    if (start, stop, step) == (0, int(shape[dim]), 1):
        return inner
    return _call("slice", inner, [dim, start, stop, step])


def _call(name: str, inner: str, numbers: Any) -> str:
    return f"{name}({', '.join([inner, *(str(int(number)) for number in numbers)])})"


_VIEWS = frozenset({"aten.view.default", "aten.permute.default", "aten.slice.Tensor"})
