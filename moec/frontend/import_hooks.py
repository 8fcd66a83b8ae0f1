"""The operations of `hooks` as operations of the dialects nn and moe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from moec.dialects import moe, nn
from moec.errors import UnsupportedModelError
from moec.frontend.expert_body import TOKENS, body_of
from moec.frontend.graph_importer import GraphImporter, Handler, ImportNames
from moec.frontend.graph_types import is_tensor_node, node_type
from moec.frontend.sizes import SizeTranslator
from moec.ir import Block, DType, Region, TensorType, Value, symbol


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The nodes of the program's own inputs, in order."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    by_name = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    return [by_name[name] for name in names]


def user_outputs(program: ExportedProgram) -> list[fx.Node]:
    """The nodes of the program's own results, in order; buffers that it writes back are not among them."""
    names = [spec.arg.name for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    by_name = {node.name: node for node in program.graph.nodes}
    return [by_name[name] for name in names]


def nodes_reaching(outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """All nodes that an output depends on through tensors."""
    found: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in found or not is_tensor_node(node):
            continue
        found.add(node)
        source = node.args[1] if str(node.target) == "aten.copy.default" else None
        # copy(destination, source) takes only shape and dtype from the destination
        stack.extend([source] if isinstance(source, fx.Node) else node.all_input_nodes)
    return found


def _import_attention_mask(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Value:
    mask = nn.AttentionMaskOp(
        _integer_padding(importer, arguments["padding"]),
        result_types=[node_type(node, importer.sizes)],
        causal=arguments["causal"],
        window=arguments["window"],
        chunk=arguments["chunk"],
        location=importer.location,
    )
    return importer.append(mask)


def _integer_padding(importer: GraphImporter, node: fx.Node) -> Value:
    """The padding mask as int64: transformers casts the input to boolean first, which is looked through."""
    source = node
    while str(source.target) == "aten._to_copy.default" and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    value = importer.value(source)
    kind = value.type
    assert isinstance(kind, TensorType)
    if kind.dtype is DType.I64:
        return value
    wide = kind.with_dtype(DType.I64)
    return importer.append_aten("_to_copy.default", {"self": value}, wide, dtype=DType.I64)


def _import_attention(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Value:
    tensors = [arguments[key] for key in ("query", "key", "value", "mask", "sinks")]
    attention = nn.AttentionOp(
        *[None if tensor is None else importer.value(tensor) for tensor in tensors],
        scale=float(arguments["scale"]),
        softcap=float(arguments["softcap"]),
        location=importer.location,
    )
    return importer.append(attention)


def _import_experts(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Value:
    x, ids, gates = (importer.value(arguments[key]) for key in ("x", "ids", "gates"))
    weights = [importer.weight(weight) for weight in arguments["weights"]]
    stacks = [weight.type for weight in weights]
    first = stacks[0]
    assert isinstance(first, TensorType)
    everyone = tuple(range(first.static_shape[0]))
    experts = moe.ExpertsOp(
        x,
        ids,
        gates,
        weights,
        regions=[_import_body(importer, str(arguments["body"]), stacks)],
        stored=everyone,
        classes=(moe.ExpertClass(everyone, len(weights)),),
        location=importer.location,
    )
    return importer.append(experts)


def _import_body(importer: GraphImporter, digest: str, stacks: list[Any]) -> Region:
    """The region of one class of experts from its traced body, for stacks of the given types."""
    program = body_of(digest).program
    inputs, outputs = user_inputs(program), user_outputs(program)
    size = inputs[0].meta["val"].shape[0]
    sizes = SizeTranslator({size.node.expr.name: symbol(TOKENS)} if isinstance(size, torch.SymInt) else {})
    kinds = [node_type(inputs[0], sizes), *[TensorType(kind.shape[1:], kind.dtype) for kind in stacks]]
    block = Block(kinds)
    inner = GraphImporter(program, ImportNames(), sizes, block, nodes_reaching(outputs), importer.handlers)
    inner.values.update(zip(inputs, block.arguments, strict=True))
    inner.run()
    results = [inner.value(node) for node in outputs]
    block.append(moe.YieldOp(results, result_types=[], location=importer.location))
    return Region(block)


def _refuse_mask(importer: GraphImporter, node: fx.Node, arguments: dict[str, Any]) -> Value:
    raise UnsupportedModelError(str(arguments["reason"]))


HOOK_HANDLERS: dict[str, Handler] = {
    "moec.attention_mask.default": _import_attention_mask,
    "moec.attention.default": _import_attention,
    "moec.experts.default": _import_experts,
    "moec.unsupported_mask.default": _refuse_mask,
}
