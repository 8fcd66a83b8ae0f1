"""Attention whose heads are experts: what a group of heads gives through its columns of the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, RouteOp, Routing, WeightFrom, YieldOp
from moec.dialects.nn import TOKENS, AttentionOp
from moec.experts.layer import MoeLayer
from moec.experts.parts import erase_unused, f32, new_weight, settle_names, store_tensor, tensor_of
from moec.ir import Block, DimExpr, DType, Operation, Region, TensorType, Value
from moec.weights.context import WeightContext

# what may lie between the map that makes queries and the attention, and between the attention and the output's map
_BEFORE_QUERY = frozenset(
    {
        "nn.rotary",
        "nn.rms_norm",
        "aten.mul.Scalar",
        "aten.mul.Tensor",
        "aten.permute.default",
        "aten.split_with_sizes.default",
        "aten.transpose.int",
        "aten.view.default",
    }
)
_SIDE_BY_SIDE = frozenset({"aten.clone.default", "aten.reshape.default", "aten.view.default"})


class UnreadableAttentionError(Exception):
    """Why the heads of an attention cannot become experts, in words."""


@dataclass(frozen=True)
class AttentionHeads:
    """One `nn.attention`, the linear map `projection` of its heads' outputs `x` [..., heads * head size], and the rows
    [..., H] that `query_map` makes its queries of. `units` heads of keys have `unit_size` columns of the projection
    each."""

    name: str
    index: int
    op: AttentionOp
    x: Value
    projection: AtenOp
    query_map: AtenOp
    units: int
    unit_size: int

    @property
    def rows(self) -> Value:
        """What queries are made of, and what a router of the heads reads."""
        return _rows_of(self.query_map)

    def load_units(self, weights: WeightContext) -> torch.Tensor:
        """The columns of the output projection of each group of query heads that share a key, float32 [units, H, c]."""
        weight = _weight_of(self.projection).defining_op
        assert isinstance(weight, WeightOp)
        matrix = weights.load(weight.source).float()
        matrix = matrix.T if self.projection.name == _ADDMM else matrix
        return matrix.reshape(len(matrix), self.units, self.unit_size).transpose(0, 1)

    @property
    def bias(self) -> Value | None:
        """What the projection adds, [H]."""
        if self.projection.name == _ADDMM:
            return self.projection.tensor("self")
        return next(iter(self.projection.tensors("bias")), None)


_ADDMM, _LINEAR = "aten.addmm.default", "aten.linear.default"


def _is_map(op: Operation | None) -> TypeGuard[AtenOp]:
    """Whether an operation is x W^T + b."""
    if not isinstance(op, AtenOp):
        return False
    return op.name == _LINEAR or (op.name == _ADDMM and op.argument("alpha") == 1 and op.argument("beta") == 1)


def _rows_of(op: AtenOp) -> Value:
    return op.tensor("mat1" if op.name == _ADDMM else "input")


def _weight_of(op: AtenOp) -> Value:
    return op.tensor("mat2" if op.name == _ADDMM else "weight")


def find_attention(root: Operation) -> tuple[AttentionOp, ...]:
    """The attention operations of a module in order."""
    return tuple(op for op in root.walk() if isinstance(op, AttentionOp))


def read_heads(op: AttentionOp, index: int) -> AttentionHeads:
    """Takes an attention apart; raises UnreadableAttentionError where it is another one."""
    value = op.output
    projection = _only_user(value)
    while projection is not None and projection.name in _SIDE_BY_SIDE:
        value = projection.results[0]
        projection = _only_user(value)
    if not _is_map(projection) or _rows_of(projection) is not value:
        raise UnreadableAttentionError("its heads do not go into one linear map")
    if not isinstance(_weight_of(projection).defining_op, WeightOp):
        raise UnreadableAttentionError("its output projection is no plain weight")
    width, hidden = tensor_of(value).shape[-1], tensor_of(projection.result).shape[-1]
    if width != hidden:
        raise UnreadableAttentionError(f"its heads have {width} channels, and an expert gives as many as it reads")
    maker = op.query.defining_op
    while maker is not None and maker.name in _BEFORE_QUERY:
        maker = maker.operands[0].defining_op
    if not _is_map(maker):
        raise UnreadableAttentionError("its queries are not one linear map of the hidden states")
    rows = _rows_of(maker)
    if _tokens(rows) != _tokens(value):
        raise UnreadableAttentionError("its queries are of other tokens than its output")
    units = tensor_of(op.key).shape[1]
    assert isinstance(units, int) and isinstance(width, int)
    name = projection.location.name or op.location.name or "attention"
    return AttentionHeads(name, index, op, value, projection, maker, units, width // units)


def readable_heads(root: Operation) -> list[AttentionHeads]:
    """The attention of a module whose heads can become experts, in order."""
    found = []
    for index, op in enumerate(find_attention(root)):
        try:
            found.append(read_heads(op, index))
        except UnreadableAttentionError:
            continue
    return found


def make_heads_sparse(heads: AttentionHeads, weights: WeightContext, groups: Sequence[Sequence[int]]) -> MoeLayer:
    """Makes an expert of each group of units, which together are all of them; all are chosen with gate 1.

    The router reads what the queries are made of, and is zero. A bias of the projection is added once.
    Raises UsageError where there is no store.
    """
    old = heads.projection
    kind = tensor_of(old.result)
    tokens = _tokens(heads.x)
    width, count = heads.units * heads.unit_size, len(groups)

    def insert(op: Operation) -> Value:
        op.location = old.location
        op.insert_before(old)
        return op.results[0]

    def flat(value: Value) -> Value:
        if tensor_of(value).rank == 2:
            return value
        shape = (tokens, tensor_of(value).shape[-1])
        made = TensorType(shape, kind.dtype)
        return insert(aten.build("view.default", {"self": value}, (made,), size=shape))

    x, rows = flat(heads.x), flat(heads.rows)
    zeros = torch.zeros(count, _last(rows))
    router_weight = new_weight(old, f"{heads.name}.router.weight", store_tensor(weights, zeros), tuple(zeros.shape))
    logits = TensorType((tokens, count), kind.dtype)
    router = aten.build("linear.default", {"input": rows, "weight": router_weight}, (logits,))
    insert(router)
    route = RouteOp(router.result, routing=Routing(k=count, weight_from=WeightFrom.ONE))
    insert(route)
    units = heads.load_units(weights)
    operands = []
    for number, group in enumerate(groups):
        columns = torch.cat([units[unit] for unit in group], dim=1)[None]
        name = f"{heads.name}.heads_{number}"
        operands.append(new_weight(old, name, store_tensor(weights, columns), tuple(columns.shape)))
    experts = ExpertsOp(
        x,
        route.ids,
        route.gates,
        operands,
        regions=[_body(group, width, heads.unit_size) for group in groups],
        stored=tuple(range(count)),
        classes=tuple(ExpertClass((number,), 1) for number in range(count)),
    )
    result = insert(experts)
    if kind.rank != 2:
        result = insert(aten.build("view.default", {"self": result}, (kind,), size=kind.shape))
    if heads.bias is not None:
        result = insert(aten.build("add.Tensor", {"self": result, "other": heads.bias}, (kind,)))
    old.result.replace_all_uses_with(result)
    erase_unused(old)
    settle_names(experts)
    return MoeLayer(heads.name, heads.index, route, experts, router)


def _body(group: Sequence[int], width: int, size: int) -> Region:
    """[tokens, width] -> the columns of the units `group`, through a matrix [width, columns]."""
    columns = len(group) * size
    block = Block([TensorType((TOKENS, width), DType.F32), f32((width, columns))])
    rows, weight = block.arguments
    runs: list[list[int]] = []
    for unit in group:
        if runs and unit == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([unit, unit + 1])

    def append(op: AtenOp) -> Value:
        block.append(op)
        return op.result

    parts = tuple(
        append(
            aten.build(
                "slice.Tensor",
                {"self": rows},
                (TensorType((TOKENS, (stop - start) * size), DType.F32),),
                dim=1,
                start=start * size,
                end=stop * size,
                step=1,
            )
        )
        for start, stop in runs
    )
    taken = parts[0]
    if len(parts) > 1:
        taken = append(
            aten.build("cat.default", {"tensors": parts}, (TensorType((TOKENS, columns), DType.F32),), dim=1)
        )
    given = aten.build("linear.default", {"input": taken, "weight": weight}, (TensorType((TOKENS, width), DType.F32),))
    block.append(given)
    block.append(YieldOp([given.result], result_types=[]))
    return Region(block)


def _only_user(value: Value) -> Operation | None:
    users = list(value.users)
    return users[0] if len(users) == 1 else None


def _tokens(value: Value) -> int | DimExpr:
    """All sizes but the last, multiplied."""
    tokens: int | DimExpr = 1
    for size in tensor_of(value).shape[:-1]:
        tokens = tokens * size
    return tokens


def _last(value: Value) -> int:
    size = tensor_of(value).shape[-1]
    assert isinstance(size, int)
    return size
