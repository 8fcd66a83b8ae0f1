"""A user's own `nn.Module` as a module of moec, through torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

from moec.errors import UsageError
from moec.frontend.decompositions import decompose
from moec.frontend.experts_adapter import ExpertsAdapter, MarkedBlocks, mark_blocks
from moec.frontend.graph_importer import ImportNames
from moec.frontend.import_graph import ImportOptions, first_names, import_program
from moec.frontend.size_guards import refuse_fixed_sizes
from moec.frontend.trace import exporting
from moec.ir import DimExpr, symbol
from moec.module import Module, SourceFacts
from moec.weights.context import WeightContext
from moec.weights.expression import Reference
from moec.weights.store import WeightStore

# The adapter's forward must agree with the block's own to this share of the largest output.
_ADAPTER_TOLERANCE = 1e-4

DynamicSizes = Mapping[str, Mapping[int, str]]


def load_torch(
    module: nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    dynamic: DynamicSizes | None = None,
    experts: Sequence[ExpertsAdapter] = (),
    result_names: Sequence[str] = (),
    store: WeightStore | None = None,
) -> Module:
    """Traces a float32 module in evaluation mode. Its tensors stay where they are; the weights refer to them by name.

    `example_inputs`: the arguments of its forward, in order or by name, all tensors. `dynamic`: for an input's name,
    which axes are of any size, as {axis: symbol}; axes with the same symbol have the same size. `experts`: adapters for
    blocks of experts. `result_names`: one name for each tensor that the module returns.

    Raises UsageError for inputs, names or adapters that do not fit, and UnsupportedModelError, with the place in the
    module, for what cannot be traced or said in the IR.
    """
    inputs = _named_inputs(module, example_inputs)
    sizes = _input_sizes(inputs, dynamic or {})
    _check_float32(module)
    where = type(module).__name__
    with _evaluation(module), torch.no_grad():
        marked = mark_blocks(module, experts)
        expected = _tensors(module(**inputs))
        _check_adapters(module, marked, inputs, expected)
        with marked.standing_for_experts() as stand_ins, exporting(where):
            axes = {name: dict.fromkeys((dynamic or {}).get(name, {}), Dim.AUTO) or None for name in inputs}
            program = export(module, (), inputs, dynamic_shapes=axes, strict=False)
            refuse_fixed_sizes(program, dynamic or {}, where)
            program = decompose(program)
            refuse_fixed_sizes(program, dynamic or {}, where)
    names = tuple(result_names) or _default_result_names(len(expected))
    if len(names) != len(expected):
        raise UsageError(f"{len(names)} result names are given for {len(expected)} results")
    tensors = module.state_dict(keep_vars=True)
    sources = {name: str(Reference(name)) for name in tensors}
    sources.update((stand_in.name, str(stand_in.expression)) for stand_in in stand_ins.values())
    shown = {name: stand_in.name for name, stand_in in stand_ins.items()}
    options = ImportOptions(
        names=ImportNames(sources=sources, aliases={**first_names(module), **shown}),
        inputs=sizes,
        result_names=names,
        required_inputs=tuple(inputs),
    )
    graph = import_program(program, options)
    memory = {name: tensor.detach() for name, tensor in tensors.items()}
    facts = SourceFacts(kind="module", class_name=where, tensors_total=len(tensors), tensors_used=len(tensors))
    return Module(graph.module, WeightContext(None, store, memory), facts)


def _named_inputs(
    module: nn.Module, given: Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if isinstance(given, Mapping):
        inputs = dict(given)
    else:
        bound = inspect.signature(module.forward).bind(*given)
        inputs = dict(bound.arguments)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"the example input {name!r} is a {type(value).__name__}, not a tensor")
    return inputs


def _input_sizes(inputs: dict[str, torch.Tensor], dynamic: DynamicSizes) -> dict[str, tuple[int | DimExpr, ...]]:
    for name in dynamic:
        if name not in inputs:
            raise UsageError(f"dynamic sizes are given for {name!r}, but the inputs are {list(inputs)}")
    sizes: dict[str, tuple[int | DimExpr, ...]] = {}
    for name, tensor in inputs.items():
        axes = dynamic.get(name, {})
        if any(not 0 <= axis < tensor.ndim for axis in axes):
            raise UsageError(f"dynamic sizes {dict(axes)} do not fit the input {name!r} of {tensor.ndim} axes")
        sizes[name] = tuple(symbol(axes[axis]) if axis in axes else size for axis, size in enumerate(tensor.shape))
    return sizes


def _check_float32(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"{name} is {tensor.dtype}", where=type(module).__name__, hint="call module.float() first")


def _tensors(result: object) -> list[torch.Tensor]:
    leaves = tree_leaves(result)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise UsageError("the module must return tensors only", hint="wrap it in a module that does")
    return list(leaves)


def _default_result_names(count: int) -> tuple[str, ...]:
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))


def _check_adapters(
    module: nn.Module, marked: MarkedBlocks, inputs: dict[str, torch.Tensor], expected: list[torch.Tensor]
) -> None:
    """Raises UsageError if the module computes something else with the adapters' forwards."""
    if not marked.blocks:
        return
    with marked.computing_directly():
        computed = _tensors(module(**inputs))
    for block in marked.blocks:
        if not block.hidden_size:
            raise UsageError("the adapter's forward did not call run_experts", where=block.name)
    for found, wanted in zip(computed, expected, strict=True):
        difference = float((found - wanted).abs().max())
        if not difference <= _ADAPTER_TOLERANCE * float(wanted.abs().max()):
            raise UsageError(
                f"with the adapter the module's output differs by {difference:.3g} on the example inputs",
                where=", ".join(block.name for block in marked.blocks[:3]),
                hint="the adapter's forward must compute what the block computes",
            )


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
