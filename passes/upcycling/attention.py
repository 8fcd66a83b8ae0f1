"""Attention layers of several models as soft experts: every token runs all of them, and a router weighs what they give.

y = sum_i p_i(x) Attn_i(x) with p = softmax(R x) (BAM). With shared keys and values it is one attention with the queries
of all experts over the key/value heads of one, whose output is multiplied with p before the projections: the cache
then does not grow with the number of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.dialects.nn import AttentionOp, LayerNormOp, RMSNormOp, RotaryOp
from moec.experts.parts import erase_unused, new_weight, store_tensor
from moec.frontend.other_sources import OtherSource
from moec.ir import Operation, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import shape, tensor
from moec.weights.context import WeightContext
from moec.weights.expression import Expression, Reshape, Stack
from moec.weights.expression_parser import parse_expression

_MOVING = frozenset(
    f"aten.{name}" for name in ("view.default", "permute.default", "transpose.int", "clone.default", "reshape.default")
)


@dataclass(frozen=True)
class AttentionBlock:
    """From the projections of `rows` [batch, seq, H] to the output projection, in the order of the function.

    `steps` are all operations in between that depend on `rows`, both ends included; the last one is `output`.
    """

    attention: AttentionOp
    rows: Value
    steps: tuple[Operation, ...]
    output: AtenOp

    @property
    def hidden_size(self) -> int:
        """H."""
        size = shape(self.rows)[2]
        assert isinstance(size, int)
        return size

    @property
    def name(self) -> str:
        """Where the block is in the model."""
        return self.output.location.name or "attention"

    def weights(self) -> set[WeightOp]:
        """All weights that the block reads."""
        read = {value.defining_op for step in self.steps for value in step.operands}
        return {op for op in read if isinstance(op, WeightOp)}

    def weights_of_one_expert(self) -> set[WeightOp]:
        """What stays each expert's own where keys and values are shared: the projections of queries and outputs."""
        own = (self.query_projection, self.output)
        read = {value.defining_op for op in own if op is not None for value in op.operands}
        return {op for op in read if isinstance(op, WeightOp)}

    @property
    def query_projection(self) -> AtenOp | None:
        """The projection that makes queries and nothing else."""
        made = _makers(self.attention.query)
        others = {*_makers(self.attention.key), *_makers(self.attention.value)}
        own = [op for op in made if isinstance(op, AtenOp) and _is_projection(op)]
        return own[0] if len(own) == 1 and own[0] not in others else None


def find_attention(root: Operation) -> list[tuple[AttentionOp, AttentionBlock | str]]:
    """Every attention with its block, or with the reason why it is none that can become experts."""
    return [(op, _read(op)) for op in root.walk() if isinstance(op, AttentionOp)]


def _read(attention: AttentionOp) -> AttentionBlock | str:
    inner = {op for value in (attention.query, attention.key, attention.value) for op in _makers(value)}
    projections = [op for op in inner if _is_projection(op)]
    if attention.past_key is not None:
        return "it has a cache already"
    if attention.sinks is not None:
        return "its sinks belong to no projection"
    sources = [op.operands[0] for op in projections]
    if not sources or any(source is not sources[0] for source in sources):
        return "queries, keys and values are not projections of the same rows"
    if len(shape(sources[0])) != 3:
        return f"its rows have {len(shape(sources[0]))} axes instead of 3"
    chain: list[Operation] = []
    value: Value = attention.output
    while True:
        if not value.has_one_use:
            return "its output is read in several places"
        user = value.users[0]
        chain.append(user)
        if _is_projection(user):
            break
        if user.name not in _MOVING:
            return f"{user.name} stands between it and the output projection"
        value = user.results[0]
    output = chain[-1]
    assert isinstance(output, AtenOp)
    wanted = {*inner, attention, *chain}
    block = attention.parent
    assert block is not None
    return AttentionBlock(attention, sources[0], tuple(op for op in block if op in wanted), output)


def _is_projection(op: Operation) -> bool:
    return op.name == "aten.linear.default" and isinstance(op.operands[1].defining_op, WeightOp)


def _makers(value: Value) -> dict[Operation, None]:
    """What lies between projections and a value, projections included, in no order."""
    found: dict[Operation, None] = {}

    def visit(value: Value) -> bool:
        op = value.defining_op
        if op is None or isinstance(op, WeightOp):
            return False
        if op in found:
            return True
        if _is_projection(op):
            found[op] = None
            return True
        # what only comes from positions is the same for all experts
        reached = [visit(operand) for operand in op.operands]
        if any(reached):
            found[op] = None
        return any(reached)

    visit(value)
    return found


def soften(
    block: AttentionBlock, weights: WeightContext, sources: Sequence[OtherSource | None], router: torch.Tensor
) -> None:
    """Replaces the block by one attention of each source (None is the first model), added up with the router's softmax.

    `router` float32 [sources, H]. Every expert keeps its own cache.
    """
    build = _builder(block)
    gates = _gates(block, weights, build, router)
    total: Value | None = None
    for number, source in enumerate(sources):
        mapping: dict[Value, Value] = {}
        for step in block.steps:
            for value in step.operands:
                weight = value.defining_op
                if isinstance(weight, WeightOp) and value not in mapping and source is not None:
                    mapping[value] = new_weight(
                        block.output,
                        f"{weight.weight_name}.expert_{number}",
                        source.expression(parse_expression(weight.source)),
                        tensor(value).static_shape,
                    )
            copy = step.clone(mapping)
            copy.insert_before(block.output)
        share = build.channels(gates, number, 1)
        result = mapping[block.output.result]
        part = build.aten("mul.Tensor", {"self": result, "other": share}, tensor(result))
        total = part if total is None else build.aten("add.Tensor", {"self": total, "other": part}, tensor(result))
    assert total is not None
    _replace(block, total)


def sharing_problem(block: AttentionBlock) -> str:
    """Why experts of the block cannot share keys and values, in words; empty where they can."""
    query = block.query_projection
    if query is None:
        return "queries, keys and values come from one projection"
    op = block.attention.query.defining_op
    while op is not None and op is not query:
        if op.name not in _MOVING and not isinstance(op, RotaryOp | RMSNormOp | LayerNormOp):
            return f"its queries go through {op.name}"
        op = op.operands[0].defining_op
    if block.attention.mask is not None and shape(block.attention.mask)[1] != 1:
        return "its mask differs from head to head"
    return ""


def widen(
    block: AttentionBlock, weights: WeightContext, sources: Sequence[OtherSource | None], router: torch.Tensor
) -> None:
    """Replaces the block by one attention with the queries of all sources over the keys and values that it has.

    `router` float32 [sources, H]. Heads are ordered by key/value head, then by source, so that groups stay together.
    The block must be one without a `sharing_problem`.
    """
    build, old, count = _builder(block), block.attention, len(sources)
    gates = _gates(block, weights, build, router)
    batch, heads, seq, width = shape(old.query)
    key_heads, value_width = shape(old.key)[1], shape(old.value)[3]
    assert isinstance(heads, int) and isinstance(key_heads, int) and isinstance(value_width, int)
    assert isinstance(width, int)
    group = heads // key_heads
    query = block.query_projection
    assert query is not None
    hidden = block.hidden_size

    def stacked(value: Value, sizes: tuple[int, ...], dim: int, total: tuple[int, ...]) -> Value:
        """The weight of all sources: cut to `sizes`, one beside the other along `dim`, seen as `total`."""
        weight = value.defining_op
        assert isinstance(weight, WeightOp)
        own = parse_expression(weight.source)
        parts: list[Expression] = [Reshape(own if item is None else item.expression(own), sizes) for item in sources]
        source = Reshape(Stack(dim, tuple(parts)), total)
        return new_weight(block.output, f"{weight.weight_name}.experts", source, total)

    run = group * width
    tensors: dict[str, Value | tuple[Value, ...]] = {"input": block.rows}
    tensors["weight"] = stacked(query.tensor("weight"), (key_heads, run, hidden), 1, (key_heads * count * run, hidden))
    for bias in query.tensors("bias"):
        tensors["bias"] = stacked(bias, (key_heads, run), 1, (key_heads * count * run,))
    kind = tensor(old.query).dtype
    value = build.aten("linear.default", tensors, TensorType((batch, seq, heads * count * width), kind))
    chain: list[Operation] = []
    op = old.query.defining_op
    while op is not query:
        assert op is not None
        chain.append(op)
        op = op.operands[0].defining_op
    for step in reversed(chain):
        copy = step.clone({step.operands[0]: value})
        before = tensor(step.results[0])
        sizes = tuple(size * count if _is_heads(step, axis, block) else size for axis, size in enumerate(before.shape))
        copy.results[0].type = TensorType(sizes, before.dtype)
        if "size" in copy.attributes:
            copy.attributes["size"] = sizes
        copy.insert_before(block.output)
        value = copy.results[0]
    wide = AttentionOp(
        value,
        old.key,
        old.value,
        old.mask,
        None,
        None,
        None,
        scale=old.scale,
        softcap=old.softcap,
        location=old.location,
    )
    wide.insert_before(block.output)
    cut = build.view(wide.output, (batch, seq, key_heads, count, group * value_width))
    share = build.view(gates, (batch, seq, 1, count, 1))
    weighed = build.aten("mul.Tensor", {"self": cut, "other": share}, tensor(cut))
    flat = build.view(weighed, (batch, seq, key_heads * count * group * value_width))
    outputs = shape(block.output.result)[2]
    assert isinstance(outputs, int)
    weight = stacked(
        block.output.tensor("weight"),
        (outputs, key_heads, group * value_width),
        2,
        (outputs, key_heads * count * group * value_width),
    )
    total = build.aten("linear.default", {"input": flat, "weight": weight}, tensor(block.output.result))
    for bias in block.output.tensors("bias"):
        each = stacked(bias, (outputs,), 1, (outputs, count))
        added = build.aten("linear.default", {"input": gates, "weight": each}, tensor(block.output.result))
        total = build.aten("add.Tensor", {"self": total, "other": added}, tensor(block.output.result))
    _replace(block, total)


def _is_heads(step: Operation, axis: int, block: AttentionBlock) -> bool:
    """Whether an axis of what a step of the queries gives counts heads."""
    rank = len(shape(step.results[0]))
    if rank != 4:
        return axis == rank - 1
    position = 1
    op: Operation | None = block.attention.query.defining_op
    # from the attention back to the step, through what moves axes
    while op is not None and op is not step:
        if op.name == "aten.permute.default":
            position = [dim % 4 for dim in op.attributes["dims"]][position]
        elif op.name == "aten.transpose.int":
            first, second = op.attributes["dim0"] % 4, op.attributes["dim1"] % 4
            position = {first: second, second: first}.get(position, position)
        op = op.operands[0].defining_op
    return axis == position


def _gates(block: AttentionBlock, weights: WeightContext, build: Builder, router: torch.Tensor) -> Value:
    """The router's softmax [batch, seq, sources]."""
    batch, seq, _ = shape(block.rows)
    place = new_weight(block.output, f"{block.name}.router.weight", store_tensor(weights, router), tuple(router.shape))
    kind = TensorType((batch, seq, len(router)), tensor(block.rows).dtype)
    logits = build.aten("linear.default", {"input": block.rows, "weight": place}, kind)
    return build.aten("softmax.int", {"self": logits}, kind, dim=2)


def _builder(block: AttentionBlock) -> Builder:
    def insert(op: Operation) -> None:
        op.location = block.output.location
        op.insert_before(block.output)

    return Builder(insert)


def _replace(block: AttentionBlock, value: Value) -> None:
    block.output.result.replace_all_uses_with(value)
    erase_unused(block.output)
