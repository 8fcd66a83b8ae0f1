"""Walks a traced graph and appends IR operations to one block: the body of a function or of an expert."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moec.dialects import aten, builtin
from moec.errors import UnsupportedModelError
from moec.frontend.assembly import Assembly, materialise
from moec.frontend.constant_folding import ConstantFolder
from moec.frontend.graph_types import arguments_by_name, constant, element_type, is_tensor_node, node_type, traced_type
from moec.frontend.locations import LocationReader
from moec.frontend.scalar_overloads import SCALAR_OVERLOADS
from moec.frontend.sizes import SizeTranslator
from moec.frontend.weight_views import parameter_behind, view_expression
from moec.ir import Block, Location, Operation, TensorType, Value

# Identities once a program is functional and knows no memory layout.
_IDENTITIES = frozenset(
    f"aten.{name}.default"
    for name in ("clone", "detach", "alias", "contiguous", "lift_fresh_copy", "lift_fresh", "dropout")
)
# Arguments that say where and how a result lies in memory, which the IR does not know.
_LAYOUT_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})

Handler = Callable[["GraphImporter", fx.Node, dict[str, Any]], Value | Assembly]


@dataclass(frozen=True)
class ImportNames:
    """How names of the program appear in the IR.

    prefix: in front of every parameter name, buffer name and module path of the program, removed in the IR.
    sources: weight expression of each parameter and persistent buffer by name (without prefix).
    aliases: for a parameter with several names, the one by which it is known here and in `sources`.
    """

    prefix: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


class GraphImporter:
    """Imports the nodes `live` of a program into `block`; `handlers` take the operations that are not plain ATen."""

    def __init__(
        self,
        program: ExportedProgram,
        names: ImportNames,
        sizes: SizeTranslator,
        block: Block,
        live: set[fx.Node],
        handlers: Mapping[str, Handler],
    ) -> None:
        self.sizes = sizes
        self.handlers = handlers
        self.location = Location()
        self.values: dict[fx.Node, Value | Assembly | tuple[Value, ...]] = {}
        self.used_weights: list[str] = []
        self._program = program
        self._names = names
        self._block = block
        self._live = live
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._locations = LocationReader(names.prefix)
        self._folder = ConstantFolder(program)

    @property
    def block(self) -> Block:
        """Where operations are appended."""
        return self._block

    def run(self) -> None:
        """Imports every live call, in order. Raises UnsupportedModelError with the place in the model."""
        for node in self._program.graph.nodes:
            if node not in self._live or node.op in ("placeholder", "output") or self._comes_on_demand(node):
                continue
            self.location = self._locations.of(node)
            try:
                self._import(node)
            except UnsupportedModelError as error:
                if error.where:
                    raise
                raise UnsupportedModelError(error.message, where=str(self.location), hint=error.hint) from error

    def value(self, node: fx.Node) -> Value:
        """The value of a node; parameters, buffers and constants are brought in at their first use."""
        found = self.raw_value(node)
        if isinstance(found, Assembly):
            found = self.values[node] = materialise(found, self._block, self.location)
        if isinstance(found, tuple):
            raise UnsupportedModelError(f"the list of results of {node.target} is used as one tensor")
        return found

    def weight(self, node: fx.Node) -> Value:
        """The value of a node that is a parameter or a view of one: a weight of its own, without operations."""
        parameter = parameter_behind(node)
        if parameter is None or parameter is node or not self._is_stored(parameter):
            return self.value(node)
        return self._append_weight(node, self._name_of(parameter))

    def raw_value(self, node: fx.Node) -> Value | Assembly | tuple[Value, ...]:
        """As `value`, but a tensor that is filled in pieces stays in pieces."""
        if node not in self.values:
            if self._folder.is_factory(node):
                self._import(node)
            elif self._folder.is_constant(node):
                name = self._name_of(node) if node.op == "placeholder" else self._locations.of(node).name
                kind = node_type(node, self.sizes)
                self.values[node] = self.append(constant(self._folder.value(node), kind, Location(name)))
            else:
                self.values[node] = self._bring_in(node)
        return self.values[node]

    def append(self, op: Operation) -> Value:
        """Puts an operation at the end of the block and gives its result."""
        self._block.append(op)
        return op.result

    def append_aten(
        self, name: str, tensors: dict[str, Value | tuple[Value, ...]], kind: TensorType, **arguments: Any
    ) -> Value:
        """Appends `aten.<name>` with one result."""
        return self.append(aten.build(name, tensors, (kind,), self.location, **arguments))

    def attribute(self, argument: Any) -> Any:
        """An argument that is not a tensor, as an attribute."""
        match argument:
            case fx.Node():
                return self.attribute(argument.meta["val"])
            case bool() | int() | float() | str() | None:
                return argument
            case torch.SymInt():
                return self.sizes(argument)
            case torch.dtype():
                return element_type(argument)
            case tuple() | list():
                return tuple(self.attribute(item) for item in argument)
        raise UnsupportedModelError(f"an argument of type {type(argument).__name__} cannot be kept: {argument}")

    def _comes_on_demand(self, node: fx.Node) -> bool:
        return self._folder.is_constant(node) or self._folder.is_factory(node)

    def _name_of(self, node: fx.Node) -> str:
        name = str(self._specs[node.name].target).removeprefix(self._names.prefix)
        return self._names.aliases.get(name, name)

    def _bring_in(self, node: fx.Node) -> Value:
        name = self._name_of(node)
        if not self._is_stored(node):
            raise UnsupportedModelError("a constant of the trace has no value", where=name)
        return self._append_weight(node, name)

    def _is_stored(self, node: fx.Node) -> bool:
        """Whether a placeholder stands for a tensor of the checkpoint."""
        spec = self._specs[node.name]
        return spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and bool(spec.persistent))

    def _append_weight(self, node: fx.Node, name: str) -> Value:
        if name not in self._names.sources:
            raise UnsupportedModelError("the checkpoint has no tensor for a parameter that is used", where=name)
        self.used_weights.append(name)
        return self.append(
            builtin.WeightOp(
                result_types=[node_type(node, self.sizes)],
                weight_name=name,
                source=view_expression(node, self._names.sources[name]),
                location=Location(name),
            )
        )

    def _import(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node) and isinstance(index, int)
            results = self.values[source]
            assert isinstance(results, tuple)
            self.values[node] = results[index]
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise UnsupportedModelError(f"the operation {node.target} is not an ATen operation")
        name = str(node.target)
        arguments = arguments_by_name(node)
        if name in _IDENTITIES or _is_same_copy(node, name):
            self.values[node] = self.value(next(iter(node.all_input_nodes)))
        elif name in self.handlers:
            self.values[node] = self.handlers[name](self, node, arguments)
        elif torch.Tag.nondeterministic_seeded in node.target.tags and arguments.get("dropout_p", _drops(name)):
            raise UnsupportedModelError(f"the model draws random numbers ({name})")
        elif node.target.namespace == "aten":
            self._import_aten(node, name, arguments)
        else:
            raise UnsupportedModelError(f"the operation {name} is not an ATen operation")

    def _import_aten(self, node: fx.Node, name: str, arguments: dict[str, Any]) -> None:
        if not isinstance(arguments.get("other"), fx.Node):
            name = SCALAR_OVERLOADS.get(name, name)
        schema = aten.schema(name)
        if schema is None:
            raise UnsupportedModelError(f"the operation {name} is not in the table of ATen operations")
        results = node.meta["val"]
        many = isinstance(results, tuple | list)
        types = [traced_type(value, self.sizes) for value in (results if many else [results])]
        operands: list[Value] = []
        layout: list[str] = []
        attributes: dict[str, Any] = {}
        for key, argument in arguments.items():
            if key in _LAYOUT_ARGUMENTS:
                continue
            described = schema.arguments[key]
            if isinstance(argument, fx.Node) and is_tensor_node(argument):
                operands.append(self.value(argument))
                layout.append(key)
            elif described.is_tensor and described.is_list:
                for position, item in enumerate(argument):
                    if item is not None:
                        operands.append(self.value(item))
                        layout.append(f"{key}:{position}" if described.is_optional else key)
            elif argument is not None or (described.has_default and described.default is not None):
                value = self.attribute(argument)
                same = type(value) is type(described.default) and value == described.default
                if not (described.has_default and same):
                    attributes[key] = value
        _resolve_open_sizes(name, attributes, types[0])
        if name == "aten.rms_norm.default" and "eps" not in attributes:
            # torch takes that of the element type, which a run in another precision would not know
            attributes["eps"] = torch.finfo(results.dtype).eps
        if layout:
            attributes["operand_layout"] = tuple(layout)
        op = Operation.create(name, operands, types, attributes, [], self.location)
        self._block.append(op)
        self.values[node] = tuple(op.results) if many else op.result


def _is_same_copy(node: fx.Node, name: str) -> bool:
    """Whether a call copies a tensor to the element type that it has."""
    source = node.args[0] if node.args else None
    if name != "aten._to_copy.default" or not isinstance(source, fx.Node):
        return False
    return bool(source.meta["val"].dtype == node.meta["val"].dtype)


def _drops(name: str) -> bool:
    """Whether an operation that may draw random numbers does so by default."""
    return name != "aten.scaled_dot_product_attention.default"


def _resolve_open_sizes(name: str, attributes: dict[str, Any], result: TensorType) -> None:
    """Writes the sizes that -1 stands for."""
    if name in ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"):
        attributes["size" if "size" in attributes else "shape"] = result.shape
    elif name == "aten.expand.default":
        attributes["size"] = result.shape
