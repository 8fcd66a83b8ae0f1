"""An exported program of torch as IR.

Every ATen call becomes one `aten` operation, the operations of `hooks` become `nn.attention_mask`, `nn.attention` and
`moe.experts`, parameters become `moec.weight` and computed buffers `moec.constant`. Sizes become attributes. What does
not reach the output (assertions, buffers written back, masks that no layer reads) is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from moec.dialects import builtin, nn
from moec.errors import UnsupportedModelError
from moec.frontend.graph_importer import GraphImporter, ImportNames
from moec.frontend.graph_types import node_type
from moec.frontend.import_hooks import HOOK_HANDLERS, nodes_reaching, user_inputs, user_outputs
from moec.frontend.import_parts import PART_HANDLERS
from moec.frontend.sizes import SizeTranslator
from moec.ir import Block, DimExpr, Value

_HANDLERS = {**HOOK_HANDLERS, **PART_HANDLERS}
_VIEWS = frozenset(
    f"aten.{name}"
    for name in ("slice.Tensor", "view.default", "expand.default", "unsqueeze.default", "_to_copy.default")
)
_ADDITIONS = frozenset(f"aten.{name}.{form}" for name in ("add", "sub") for form in ("Tensor", "Scalar"))


@dataclass(frozen=True)
class ImportOptions:
    """How the function `main` looks.

    names: of parameters and places.
    inputs: the sizes of each input by name; symbols of the program are named after them.
    result_names: one for each output.
    required_inputs: kept as arguments even if nothing reads them.
    """

    names: ImportNames
    inputs: Mapping[str, tuple[int | DimExpr, ...]]
    result_names: tuple[str, ...]
    required_inputs: tuple[str, ...] = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class ImportedGraph:
    """The module operation, and which parameters and persistent buffers it uses, by name without prefix."""

    module: builtin.ModuleOp
    used_weights: tuple[str, ...]


def import_program(program: ExportedProgram, options: ImportOptions) -> ImportedGraph:
    """Imports a decomposed program.

    Raises UnsupportedModelError, naming the place in the model, for anything that the IR cannot say exactly.
    """
    inputs, outputs = user_inputs(program), user_outputs(program)
    symbols: dict[str, int | DimExpr] = {}
    for node in inputs:
        if node.name not in options.inputs:
            raise UnsupportedModelError(f"no sizes are given for the input {node.name!r}")
        for size, name in zip(node.meta["val"].shape, options.inputs[node.name], strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols[size.node.expr.name] = name
    live = nodes_reaching(outputs)
    kept = [node for node in inputs if node in live or node.name in options.required_inputs]
    sizes = SizeTranslator(symbols)
    function = builtin.FuncOp.build(
        "main", [node_type(node, sizes) for node in kept], arg_names=[node.name for node in kept]
    )
    importer = GraphImporter(program, options.names, sizes, function.body, live, _HANDLERS)
    importer.values.update(zip(kept, function.arguments, strict=True))
    importer.run()
    function.finish([importer.value(node) for node in outputs], options.result_names)
    _sweep(function.body)
    _refuse_added_booleans(function.body)
    return ImportedGraph(builtin.ModuleOp.build([function]), tuple(importer.used_weights))


def first_names(model: torch.nn.Module) -> dict[str, str]:
    """For every further name of a tied parameter, the first one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def _sweep(block: Block) -> None:
    """Removes operations whose results nothing reads."""
    for op in reversed(block):
        if op.pure and not op.has_uses:
            op.erase()


def _refuse_added_booleans(block: Block) -> None:
    """Eager attention code adds a mask of 0 and -inf to scores; here the mask is boolean, and that would be wrong."""
    for op in block:
        if op.name in _ADDITIONS and any(map(_is_attention_mask, op.operands)):
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
