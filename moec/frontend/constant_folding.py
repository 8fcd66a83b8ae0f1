"""What a traced program computes from nothing but its own constants: rotary frequencies, position tables."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

_MAX_ELEMENTS = 1 << 22


class ConstantFolder:
    """Knows which nodes have a value at import time, and computes it on request."""

    def __init__(self, program: ExportedProgram) -> None:
        self._known: dict[fx.Node, Any] = {}
        self._foldable: set[fx.Node] = set()
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                held = spec.kind is InputKind.CONSTANT_TENSOR or (spec.kind is InputKind.BUFFER and not spec.persistent)
                value = program.constants.get(spec.target) if held else None
                if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu":
                    self._known[node] = value
                    self._foldable.add(node)
            elif node.op == "call_function" and self._can_fold(node):
                self._foldable.add(node)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether `value` gives this node's value and it deserves a constant: not a lone factory such as `full`."""
        return node in self._foldable and (node.op == "placeholder" or bool(node.all_input_nodes))

    def is_factory(self, node: fx.Node) -> bool:
        """A call of fixed result without inputs. It stays an operation where something that is not folded reads it."""
        return node in self._foldable and node.op != "placeholder" and not node.all_input_nodes

    def value(self, node: fx.Node) -> Any:
        """The tensor (or tuple of tensors) that a constant node stands for."""
        if node not in self._known:
            arguments, keywords = fx.map_arg((node.args, node.kwargs), self.value)
            with torch.no_grad():
                self._known[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        return self._known[node]

    def _can_fold(self, node: fx.Node) -> bool:
        target = node.target
        if target is not operator.getitem:
            if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
                return False
            if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
                return False
            if target.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like):
                return False
        if not all(source in self._foldable for source in node.all_input_nodes):
            return False
        results = node.meta.get("val")
        tensors = results if isinstance(results, tuple | list) else [results]
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                return False
            if not all(isinstance(size, int) for size in tensor.shape) or tensor.numel() > _MAX_ELEMENTS:
                return False
        return True
