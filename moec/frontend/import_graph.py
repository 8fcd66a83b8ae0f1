"""An exported program of torch as IR.

Every ATen call becomes one `aten` operation, the operations of `hooks` become `nn.attention_mask`, `nn.attention` and
`moe.experts`, parameters become `moec.weight` and computed buffers `moec.constant`. Sizes become attributes. What does not
reach the output (assertions, buffers written back, masks that no layer reads) is not imported.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from moec.dialects import aten, builtin, moe, nn
from moec.errors import UnsupportedModelError
from moec.frontend.assembly import Assembly, materialise, overwrite, uninitialised
from moec.frontend.constant_folding import ConstantFolder
from moec.frontend.expert_body import TOKENS, body_of
from moec.frontend.locations import LocationReader
from moec.frontend.scalar_overloads import SCALAR_OVERLOADS
from moec.frontend.sizes import SizeTranslator
from moec.ir import Block, DenseConstant, DimExpr, DType, Location, Operation, Region, TensorType, Value, symbol

DTYPES = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.complex64: DType.C64,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint8: DType.U8,
    torch.bool: DType.I1,
}

# Identities once a program is functional and knows no memory layout.
_IDENTITIES = frozenset(
    {"aten.clone.default", "aten.detach.default", "aten.alias.default", "aten.contiguous.default",
     "aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.dropout.default"}
)  # fmt: skip
_UNINITIALISED = frozenset({"aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default"})
# An end beyond every size: Python's `x[start:]` is traced with the largest int64.
_END = 1 << 62
# Arguments that say where and how a result lies in memory, which the IR does not know.
_LAYOUT_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})
_VIEWS = frozenset(
    f"aten.{name}" for name in ("slice.Tensor", "view.default", "expand.default", "unsqueeze.default", "_to_copy.default")
)
_ALWAYS_KEPT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class ImportOptions:
    """How names of the program appear in the IR.

    prefix: in front of every parameter name, buffer name and module path of the program, removed in the IR.
    sources: weight expression of each parameter and persistent buffer by name (without prefix).
    aliases: for a parameter with several names, the one by which it is known here and in `sources`.
    inputs: the sizes of each input by name; symbols of the program are named after them.
    result_names: one for each output.
    required_inputs: kept as arguments even if nothing reads them.
    """

    prefix: str
    sources: Mapping[str, str]
    inputs: Mapping[str, tuple[int | DimExpr, ...]]
    result_names: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    required_inputs: tuple[str, ...] = _ALWAYS_KEPT


def first_names(model: torch.nn.Module) -> dict[str, str]:
    """For every further name of a tied parameter, the first one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


@dataclass(frozen=True)
class ImportedGraph:
    """The module operation, and which parameters and persistent buffers it uses, by name without prefix."""

    module: builtin.ModuleOp
    used_weights: tuple[str, ...]


def import_program(program: ExportedProgram, options: ImportOptions) -> ImportedGraph:
    """Imports a decomposed program.

    Raises UnsupportedModelError, naming the place in the model, for anything that the IR cannot say exactly.
    """
    user_inputs = {
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    }
    placeholders = [node for node in program.graph.find_nodes(op="placeholder") if node.name in user_inputs]
    for node in placeholders:
        if node.name not in options.inputs:
            raise UnsupportedModelError(f"no sizes are given for the input {node.name!r}")
    symbols: dict[str, int | DimExpr] = {}
    for node in placeholders:
        for size, name in zip(node.meta["val"].shape, options.inputs[node.name], strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols[size.node.expr.name] = name
    outputs = _user_outputs(program)
    live = _reaching(outputs)
    kept = [node for node in placeholders if node in live or node.name in options.required_inputs]
    sizes = SizeTranslator(symbols)
    function = builtin.FuncOp.build(
        "main", [tensor_type(node, sizes) for node in kept], arg_names=[node.name for node in kept]
    )
    importer = _Importer(program, options, sizes, function.body, live)
    importer.values.update(zip(kept, function.arguments, strict=True))
    importer.run()
    function.finish([importer.value(node) for node in outputs], options.result_names)
    _sweep(function.body)
    _refuse_added_booleans(function.body)
    return ImportedGraph(builtin.ModuleOp.build([function]), tuple(importer.used_weights))


def _sweep(block: Block) -> None:
    """Removes operations whose results nothing reads."""
    for op in reversed(block):
        if op.pure and not op.has_uses:
            op.erase()


def _refuse_added_booleans(block: Block) -> None:
    """Eager attention code adds a mask of 0 and -inf to scores; here the mask is boolean, and adding it would be wrong."""
    for op in block:
        if op.name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.add.Scalar", "aten.sub.Scalar"):
            for value in op.operands:
                if _is_attention_mask(value):
                    raise UnsupportedModelError(
                        "the model's own attention code adds a mask that is boolean here",
                        where=str(op.location),
                        hint="this model does not use transformers' attention interface",
                    )


def _is_attention_mask(value: Value) -> bool:
    op = value.defining_op
    while op is not None and op.name in _VIEWS:
        op = op.operands[0].defining_op
    return isinstance(op, nn.AttentionMaskOp)


def tensor_type(node: fx.Node, sizes: SizeTranslator) -> TensorType:
    """The type of a node that stands for one tensor."""
    return _type_of(node.meta["val"], sizes)


def _type_of(value: Any, sizes: SizeTranslator) -> TensorType:
    if not isinstance(value, torch.Tensor):
        raise UnsupportedModelError(f"a {type(value).__name__} is used as a tensor")
    if value.dtype not in DTYPES:
        raise UnsupportedModelError(f"tensors of {value.dtype} are not supported")
    return TensorType(tuple(sizes(size) for size in value.shape), DTYPES[value.dtype])


def _user_outputs(program: ExportedProgram) -> list[fx.Node]:
    names = [spec.arg.name for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    by_name = {node.name: node for node in program.graph.nodes}
    return [by_name[name] for name in names]


def _reaching(outputs: list[fx.Node]) -> set[fx.Node]:
    """All nodes that an output depends on through tensors."""
    found: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in found and _is_tensor_node(node):
            found.add(node)
            # copy(destination, source) takes only shape and dtype from the destination
            stack.extend([node.args[1]] if str(node.target) == "aten.copy.default" else node.all_input_nodes)  # type: ignore[list-item]
    return found


def _is_tensor_node(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


@dataclass
class _Importer:
    program: ExportedProgram
    options: ImportOptions
    sizes: SizeTranslator
    block: Block
    live: set[fx.Node]
    values: dict[fx.Node, Value | Assembly | tuple[Value, ...]] = field(default_factory=dict)
    used_weights: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        self._locations = LocationReader(self.options.prefix)
        self._location = Location()
        self._folder = ConstantFolder(self.program)

    def run(self) -> None:
        """Imports every live call, in order."""
        for node in self.program.graph.nodes:
            if node in self.live and node.op not in ("placeholder", "output") and not self._comes_on_demand(node):
                self._location = self._locations.of(node)
                try:
                    self._import(node)
                except UnsupportedModelError as error:
                    if error.where:
                        raise
                    raise UnsupportedModelError(error.message, where=str(self._location), hint=error.hint) from error

    def value(self, node: fx.Node) -> Value:
        """The value of a node; parameters, buffers and constants are brought in at their first use."""
        if node not in self.values:
            if self._folder.is_factory(node):
                self._import(node)
            elif self._folder.is_constant(node):
                name = self._name_of(node) if node.op == "placeholder" else self._locations.of(node).name
                held = self._folder.value(node)
                self.values[node] = self._append(_constant(held, tensor_type(node, self.sizes), Location(name))).result
            else:
                self.values[node] = self._bring_in(node)
        found = self.values[node]
        if isinstance(found, Assembly):
            found = self.values[node] = materialise(found, self.block, self._location)
        if isinstance(found, tuple):
            raise UnsupportedModelError(f"the list of results of {node.target} is used as one tensor")
        return found

    def _comes_on_demand(self, node: fx.Node) -> bool:
        return self._folder.is_constant(node) or self._folder.is_factory(node)

    def _name_of(self, node: fx.Node) -> str:
        name = str(self._specs[node.name].target).removeprefix(self.options.prefix)
        return self.options.aliases.get(name, name)

    def _append(self, op: Operation) -> Operation:
        self.block.append(op)
        return op

    def _bring_in(self, node: fx.Node) -> Value:
        spec = self._specs[node.name]
        name = self._name_of(node)
        stored = spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent)
        if not stored:
            raise UnsupportedModelError("a constant of the trace has no value", where=name)
        if name not in self.options.sources:
            raise UnsupportedModelError("the checkpoint has no tensor for a parameter that is used", where=name)
        self.used_weights.append(name)
        weight = builtin.WeightOp(
            result_types=[tensor_type(node, self.sizes)],
            weight_name=name,
            source=self.options.sources[name],
            location=Location(name),
        )
        return self._append(weight).result

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
        arguments = _by_name(node)
        if name in _IDENTITIES or self._is_same_copy(node, name):
            self.values[node] = self.value(next(iter(node.all_input_nodes)))
        elif name in _UNINITIALISED:
            self.values[node] = uninitialised(tensor_type(node, self.sizes))
        elif name == "aten.copy.default":
            self.values[node] = self._import_copy(node, arguments["src"])
        elif name in ("aten.slice_scatter.default", "aten.select_scatter.default"):
            self.values[node] = self._import_scatter(node, name, arguments)
        elif name == "aten.slice.Tensor":
            self.values[node] = self._import_slice(node, arguments)
        elif torch.Tag.nondeterministic_seeded in node.target.tags and arguments.get("dropout_p", _drops(name)):
            raise UnsupportedModelError(f"the model draws random numbers ({name})")
        elif node.target.namespace == "moec":
            self.values[node] = self._import_hook(node, name, arguments)
        elif node.target.namespace == "aten":
            self._import_aten(node, name, arguments)
        else:
            raise UnsupportedModelError(f"the operation {name} is not an ATen operation")

    def _is_same_copy(self, node: fx.Node, name: str) -> bool:
        if name != "aten._to_copy.default":
            return False
        source = node.args[0]
        return isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype

    # -- operations of the hooks ------------------------------------------------------------------------------------------

    def _import_hook(self, node: fx.Node, name: str, arguments: dict[str, Any]) -> Value:
        if name == "moec.attention_mask.default":
            padding = self._integer_padding(arguments["padding"])
            mask = nn.AttentionMaskOp(
                padding,
                result_types=[tensor_type(node, self.sizes)],
                causal=arguments["causal"],
                window=arguments["window"],
                chunk=arguments["chunk"],
                location=self._location,
            )
            return self._append(mask).result
        if name == "moec.attention.default":
            tensors = [arguments[key] for key in ("query", "key", "value", "mask", "sinks")]
            attention = nn.AttentionOp(
                *[None if tensor is None else self.value(tensor) for tensor in tensors],
                scale=float(arguments["scale"]),
                softcap=float(arguments["softcap"]),
                location=self._location,
            )
            return self._append(attention).result
        if name == "moec.experts.default":
            return self._import_experts(arguments)
        if name == "moec.unsupported_mask.default":
            raise UnsupportedModelError(str(arguments["reason"]))
        raise UnsupportedModelError(f"the operation {name} has no form in the IR")

    def _integer_padding(self, node: fx.Node) -> Value:
        """The padding mask as int64: transformers casts the input to boolean first, which is looked through."""
        source = node
        while str(source.target) == "aten._to_copy.default" and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        value = self.value(source)
        kind = value.type
        assert isinstance(kind, TensorType)
        if kind.dtype is DType.I64:
            return value
        wide = kind.with_dtype(DType.I64)
        cast = aten.build("_to_copy.default", {"self": value}, (wide,), self._location, dtype=DType.I64)
        return self._append(cast).result

    def _import_experts(self, arguments: dict[str, Any]) -> Value:
        weights = [self.value(node) for node in arguments["weights"]]
        x = self.value(arguments["x"])
        kind, first = x.type, weights[0].type
        assert isinstance(kind, TensorType) and isinstance(first, TensorType)
        count = first.static_shape[0]
        everyone = tuple(range(count))
        stacks = [weight.type for weight in weights]
        region = import_body(str(arguments["body"]), stacks, self._location)
        experts = moe.ExpertsOp(
            x,
            self.value(arguments["ids"]),
            self.value(arguments["gates"]),
            weights,
            regions=[region],
            stored=everyone,
            classes=(moe.ExpertClass(everyone, len(weights)),),
            location=self._location,
        )
        return self._append(experts).result

    # -- writing and reading parts ------------------------------------------------------------------------------------------

    def _import_copy(self, node: fx.Node, source: fx.Node) -> Value:
        """The source, with the type of the destination."""
        value, kind = self.value(source), tensor_type(node, self.sizes)
        given = value.type
        assert isinstance(given, TensorType)
        if given.dtype is not kind.dtype:
            given = given.with_dtype(kind.dtype)
            value = self._append(
                aten.build("_to_copy.default", {"self": value}, (given,), self._location, dtype=kind.dtype)
            ).result
        if given.shape != kind.shape:
            value = self._append(
                aten.build("expand.default", {"self": value}, (kind,), self._location, size=kind.shape)
            ).result
        return value

    def _scatter_strided(
        self, base_node: fx.Node, value: Value, dim: int, bounds: tuple[int | DimExpr, int | DimExpr, int]
    ) -> Value:
        """Every n-th element from `value`, the others from the base: a fixed choice from both, one after the other."""
        base = self.value(base_node)
        kind, given = base.type, value.type
        assert isinstance(kind, TensorType) and isinstance(given, TensorType)
        size, added = kind.shape[dim], given.shape[dim]
        if not isinstance(size, int) or not isinstance(added, int) or not all(isinstance(b, int) for b in bounds):
            raise UnsupportedModelError("the model writes every n-th element along an axis of any size")
        chosen = list(range(size))
        for position, index in enumerate(range(*bounds)):  # type: ignore[arg-type]
            chosen[index] = size + position
        both = TensorType((*kind.shape[:dim], size + added, *kind.shape[dim + 1 :]), kind.dtype)
        cat = aten.build("cat.default", {"tensors": (base, value)}, (both,), self._location, dim=dim)
        index = _constant(torch.tensor(chosen), TensorType((size,), DType.I64), self._location)
        self._append(cat)
        self._append(index)
        tensors = {"self": cat.result, "index": index.result}
        return self._append(aten.build("index_select.default", tensors, (kind,), self._location, dim=dim)).result

    def _import_scatter(self, node: fx.Node, name: str, arguments: dict[str, Any]) -> Assembly | Value:
        kind = tensor_type(node, self.sizes)
        base_node = arguments["self"]
        if base_node not in self.values:
            self.value(base_node)
        base = self.values[base_node]
        assert not isinstance(base, tuple)
        dim = int(arguments.get("dim", 0)) % kind.rank
        value = self.value(arguments["src"])
        if name == "aten.select_scatter.default":
            start, stop = self._bounds(kind.shape[dim], arguments["index"], None)
            stop = start + 1
            source = value.type
            assert isinstance(source, TensorType)
            wide = TensorType((*source.shape[:dim], 1, *source.shape[dim:]), source.dtype)
            value = self._append(
                aten.build("unsqueeze.default", {"self": value}, (wide,), self._location, dim=dim)
            ).result
        else:
            start, stop = self._bounds(kind.shape[dim], arguments.get("start"), arguments.get("end"))
            if arguments.get("step", 1) != 1:
                return self._scatter_strided(base_node, value, dim, (start, stop, int(arguments["step"])))
        return overwrite(base, value, dim, start, stop, self.block, self._location)

    def _import_slice(self, node: fx.Node, arguments: dict[str, Any]) -> Value:
        """A slice with bounds counted from the start; one that takes everything is the tensor itself."""
        value, kind = self.value(arguments["self"]), tensor_type(node, self.sizes)
        source = value.type
        assert isinstance(source, TensorType)
        dim = int(arguments.get("dim", 0)) % source.rank
        start, stop = self._bounds(source.shape[dim], arguments.get("start"), arguments.get("end"))
        step = int(arguments.get("step", 1))
        if start == 0 and stop == source.shape[dim] and step == 1:
            return value
        cut = aten.build(
            "slice.Tensor", {"self": value}, (kind,), self._location, dim=dim, start=start, end=stop, step=step
        )
        return self._append(cut).result

    def _bounds(self, size: int | DimExpr, start: Any, stop: Any) -> tuple[int | DimExpr, int | DimExpr]:
        """Python's slice bounds as numbers from the start, within 0 and size where that can be told."""

        def bound(given: Any, default: int | DimExpr) -> int | DimExpr:
            at = self._attribute(given)
            if at is None:
                return default
            assert isinstance(at, int | DimExpr)
            if isinstance(at, int) and at < 0:
                moved = size + at
                return max(moved, 0) if isinstance(moved, int) else moved
            if isinstance(at, int) and at >= _END:
                return size
            return min(at, size) if isinstance(at, int) and isinstance(size, int) else at

        return bound(start, 0), bound(stop, size)

    # -- ATen ---------------------------------------------------------------------------------------------------------------

    def _import_aten(self, node: fx.Node, name: str, arguments: dict[str, Any]) -> None:
        name = SCALAR_OVERLOADS.get(name, name) if not isinstance(arguments.get("other"), fx.Node) else name
        schema = aten.schema(name)
        if schema is None:
            raise UnsupportedModelError(f"the operation {name} is not in the table of ATen operations")
        results = node.meta["val"]
        many = isinstance(results, tuple | list)
        types = [_type_of(value, self.sizes) for value in (results if many else [results])]
        operands: list[Value] = []
        layout: list[str] = []
        attributes: dict[str, Any] = {}
        for key, argument in arguments.items():
            if key in _LAYOUT_ARGUMENTS:
                continue
            described = schema.arguments[key]
            if self._is_tensor(argument):
                operands.append(self.value(argument))
                layout.append(key)
            elif described.is_tensor and described.is_list:
                for position, item in enumerate(argument):
                    if item is not None:
                        operands.append(self.value(item))
                        layout.append(f"{key}:{position}" if described.is_optional else key)
            elif argument is not None or (described.has_default and described.default is not None):
                value = self._attribute(argument)
                if not (described.has_default and type(value) is type(described.default) and value == described.default):
                    attributes[key] = value
        _resolve_open_sizes(name, attributes, types[0])
        if name == "aten.rms_norm.default" and "eps" not in attributes:
            # torch takes that of the element type, which a run in another precision would not know
            attributes["eps"] = torch.finfo(results.dtype).eps
        if layout:
            attributes["operand_layout"] = tuple(layout)
        op = self._append(Operation.create(name, operands, types, attributes, [], self._location))
        self.values[node] = tuple(op.results) if many else op.result

    def _is_tensor(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and _is_tensor_node(argument)

    def _attribute(self, argument: Any) -> Any:
        match argument:
            case fx.Node():
                return self._attribute(argument.meta["val"])
            case bool() | int() | float() | str() | None:
                return argument
            case torch.SymInt():
                return self.sizes(argument)
            case torch.dtype():
                if argument not in DTYPES:
                    raise UnsupportedModelError(f"tensors of {argument} are not supported")
                return DTYPES[argument]
            case tuple() | list():
                return tuple(self._attribute(item) for item in argument)
        raise UnsupportedModelError(f"an argument of type {type(argument).__name__} cannot be kept: {argument}")


def import_body(digest: str, stacks: list[Any], location: Location) -> Region:
    """The region of one class of experts from its traced body, for stacks of the given types."""
    body = body_of(digest)
    program = body.program
    user_inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    nodes = [by_name[name] for name in user_inputs]
    size = nodes[0].meta["val"].shape[0]
    tokens = symbol(TOKENS)
    sizes = SizeTranslator({size.node.expr.name: tokens} if isinstance(size, torch.SymInt) else {})
    kinds = [tensor_type(nodes[0], sizes), *[TensorType(kind.shape[1:], kind.dtype) for kind in stacks]]
    block = Block(kinds)
    options = ImportOptions("", {}, {}, ())
    outputs = _user_outputs(program)
    importer = _Importer(program, options, sizes, block, _reaching(outputs))
    importer.values.update(zip(nodes, block.arguments, strict=True))
    importer.run()
    block.append(moe.YieldOp([importer.value(node) for node in outputs], result_types=[], location=location))
    return Region(block)


def _drops(name: str) -> bool:
    """Whether an operation that may draw random numbers does so by default."""
    return name != "aten.scaled_dot_product_attention.default"


def _by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their schema names, in schema order."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    return {name: given[name] for name in names if name in given}


def _resolve_open_sizes(name: str, attributes: dict[str, Any], result: TensorType) -> None:
    """Writes the sizes that -1 stands for."""
    if name in ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"):
        key = "size" if "size" in attributes else "shape"
        attributes[key] = result.shape
    elif name == "aten.expand.default":
        attributes["size"] = result.shape


def _constant(held: Any, kind: TensorType, location: Location) -> builtin.ConstantOp:
    if not isinstance(held, torch.Tensor) or held.device.type == "meta" or type(held).__name__ == "FakeTensor":
        raise UnsupportedModelError("a constant of the trace has no value", where=location.name)
    data = torch.view_as_real(held) if held.is_complex() else held
    raw = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return builtin.ConstantOp(result_types=[kind], data=DenseConstant(raw), location=location)
