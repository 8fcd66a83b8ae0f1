"""Attention: `aten.scaled_dot_product_attention`, and softmax(scores) v written out with matrix products."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.dialects.aten import AtenOp
from moec.dialects.nn import AttentionMaskOp, AttentionOp
from moec.ir import DimExpr, DType, TensorType, Value
from moec.passes.building import Builder, permutation
from moec.passes.matching import both_orders, is_last_axis, is_view, made_by, number, scaled_by_number, shape, tensor
from moec.rewrite import Rewriter, rewrite

Sizes = tuple[int | DimExpr, ...]

_SWAP_HEADS = (0, 2, 1, 3)
_SWAP_LAST = (0, 1, 3, 2)
# Added to any score, a number this low gives itself.
_HIDING = -1e30


@rewrite("aten.scaled_dot_product_attention.default")
def raise_fused_attention(op: AtenOp, rewriter: Rewriter) -> bool:
    """aten.scaled_dot_product_attention ==> attention"""
    query, key, value = (op.tensor(name) for name in ("query", "key", "value"))
    if len(shape(query)) != 4:
        return rewriter.refuse(op, f"the query {query.type} is not [batch, heads, seq, channels]")
    if op.argument("dropout_p"):
        return rewriter.refuse(op, "it drops values at random")
    masks = op.tensors("attn_mask")
    if op.argument("is_causal") and shape(query)[2] != shape(key)[2]:
        return rewriter.refuse(op, "it is causal over queries and keys of different lengths")
    width = shape(query)[3]
    if not isinstance(width, int):
        return rewriter.refuse(op, "the number of channels is not static")
    problem = _misfit(query.type, shape(key), shape(value), [shape(mask) for mask in masks])
    if problem:
        return rewriter.refuse(op, problem)
    scale = op.argument("scale")
    build = Builder(rewriter.insert)
    mask = _rank_four(build, masks[0]) if masks else None
    if op.argument("is_causal"):
        mask = _causal_mask(build, query, key)
    parts = _Attention(query, key, value, mask, width**-0.5 if scale is None else float(scale), 0.0)
    return _replace(op, parts, build, rewriter)


@rewrite("aten.matmul.default", "aten.bmm.default")
def raise_attention(op: AtenOp, rewriter: Rewriter) -> bool:
    """softmax(q k^T * scale + mask) v ==> attention"""
    weights, value = op.operands
    softmax = made_by(weights, "softmax.int", "_softmax.default")
    if softmax is None or not is_last_axis(softmax):
        return False
    if softmax.argument("dtype") is not None and softmax.argument("dtype") is not tensor(weights).dtype:
        return rewriter.refuse(op, "the softmax changes the element type")
    scores = softmax.tensor("self")
    if len(shape(scores)) != 4 or len(shape(value)) != 4:
        return rewriter.refuse(op, f"the scores {scores.type} are not [batch, heads, seq, keys]")
    additive, allowed = [], []
    while (masked := _masked(scores)) is not None:
        if masked.problem:
            return rewriter.refuse(op, masked.problem)
        additive += [masked.added] if masked.added is not None else []
        allowed += [masked] if masked.condition is not None else []
        scores = masked.scores
    softcap = 0.0
    if (capped := _softcapped(scores)) is not None:
        scores, softcap = capped
    scale = 1.0
    while (scaled := scaled_by_number(scores)) is not None:
        scores, scale = scaled[0], scale * scaled[1]
    product = made_by(scores, "matmul.default", "bmm.default")
    if product is None:
        made = scores.defining_op
        return rewriter.refuse(op, f"the scores come from {made.name if made else 'an argument'}, not from q k^T")
    query, transposed_key = product.operands
    if len(shape(query)) != 4 or len(shape(transposed_key)) != 4:
        return rewriter.refuse(op, f"the query {query.type} is not [batch, heads, seq, channels]")
    if (additive and allowed) or len({item.fill for item in allowed}) > 1:
        return rewriter.refuse(op, "it has masks of several kinds")
    batch, key_heads, width, keys = shape(transposed_key)
    masks = [shape(item.condition) for item in allowed if item.condition is not None] + [shape(one) for one in additive]
    problem = _misfit(query.type, (batch, key_heads, keys, width), shape(value), masks)
    if problem:
        return rewriter.refuse(op, problem)
    build = Builder(rewriter.insert)
    mask = None
    for item in allowed:
        assert item.condition is not None
        one = item.attend(build)
        mask = one if mask is None else _combined(build, "logical_and.default", mask, one)
    if mask is not None and allowed[0].fill != -math.inf:
        mask = _added(build, mask, allowed[0].fill, tensor(query).dtype)
    for added in additive:
        mask = added if mask is None else _combined(build, "add.Tensor", mask, added)
    if mask is not None:
        mask = _rank_four(build, mask)
    key = build.permute(transposed_key, _SWAP_LAST)
    return _replace(op, _Attention(query, key, value, mask, scale, softcap), build, rewriter)


@dataclass(frozen=True)
class _Attention:
    query: Value
    key: Value
    value: Value
    mask: Value | None
    scale: float
    softcap: float


def _misfit(query: object, key: Sizes, value: Sizes, masks: list[Sizes]) -> str:
    """Why sizes are not those of attention, or nothing. A pattern that inserted something must not fail any more."""
    assert isinstance(query, TensorType)
    batch, heads, length, width = query.shape
    if len(key) != 4 or len(value) != 4 or not isinstance(heads, int) or not isinstance(key[1], int):
        return "keys and values are not [batch, heads, seq, channels]"
    if heads % key[1] or key[1] != value[1] or key[2] != value[2] or key[3] != width:
        return f"{heads} heads of {width} channels do not fit keys {key} and values {value}"
    if any(one[0] not in (1, batch) for one in (key, value)):
        return f"keys {key} and values {value} are of another batch size"
    for mask in masks:
        for size, wanted in zip(reversed(mask), (key[2], length, heads, batch), strict=False):
            if size not in (1, wanted):
                return f"the mask {mask} does not fit {heads} heads, {length} queries and {key[2]} keys"
        if len(mask) > 4:
            return f"the mask {mask} has more than four axes"
    return ""


def _replace(op: AtenOp, parts: _Attention, build: Builder, rewriter: Rewriter) -> bool:
    """Replaces `op` [batch, heads, seq, Dv]; what only broadcasts in torch is expanded."""
    key, value = _without_repetition(parts.key, parts.value)
    query, mask = parts.query, parts.mask
    batch, keys = shape(query)[0], shape(key)[2]
    key, value = (build.expand(one, (batch, *shape(one)[1:])) for one in (key, value))
    if mask is not None:
        mask = build.expand(mask, (*shape(mask)[:3], keys))
        if tensor(mask).dtype not in (DType.I1, tensor(query).dtype):
            kind = tensor(mask).with_dtype(tensor(query).dtype)
            mask = build.aten("_to_copy.default", {"self": mask}, kind, dtype=kind.dtype)
    attention = AttentionOp(query, key, value, mask, scale=parts.scale, softcap=parts.softcap)
    rewriter.replace(op, build.permute(build.insert(attention), _SWAP_HEADS))
    return True


def _rank_four(build: Builder, mask: Value) -> Value:
    while len(shape(mask)) < 4:
        mask = build.unsqueeze(mask, 0)
    return mask


def _combined(build: Builder, name: str, one: Value, other: Value) -> Value:
    sizes = list(shape(_longer(one, other)))
    for value in (one, other):
        offset = len(sizes) - len(shape(value))
        for position, size in enumerate(shape(value)):
            if sizes[offset + position] == 1:
                sizes[offset + position] = size
    return build.aten(name, {"self": one, "other": other}, TensorType(tuple(sizes), tensor(one).dtype))


def _longer(one: Value, other: Value) -> Value:
    return one if len(shape(one)) >= len(shape(other)) else other


def _added(build: Builder, attend: Value, fill: float, dtype: DType) -> Value:
    """A mask to add. Unlike a boolean one it leaves a query that may see no key an average of all of them, as a finite
    fill does."""
    numbers = [
        build.aten("scalar_tensor.default", {}, TensorType((), dtype), s=number, dtype=dtype) for number in (0.0, fill)
    ]
    kind = tensor(attend).with_dtype(dtype)
    return build.aten("where.self", {"condition": attend, "self": numbers[0], "other": numbers[1]}, kind)


def _causal_mask(build: Builder, query: Value, key: Value) -> Value:
    keys = shape(key)[2]
    ones = build.aten("ones.default", {}, TensorType((1, keys), DType.I64), size=(1, keys), dtype=DType.I64)
    kind = TensorType((1, 1, shape(query)[2], keys), DType.I1)
    return build.insert(AttentionMaskOp(ones, result_types=[kind], causal=True))


@dataclass(frozen=True)
class _Masked:
    """`scores` under a mask: something `added`, or a `condition` that forbids (or allows) by writing `fill`."""

    scores: Value
    added: Value | None = None
    condition: Value | None = None
    forbids: bool = False
    fill: float = -math.inf
    problem: str = ""

    def attend(self, build: Builder) -> Value:
        """The boolean mask, true where a key may be seen."""
        assert self.condition is not None
        if not self.forbids:
            return self.condition
        inverted = made_by(self.condition, "logical_not.default", "bitwise_not.default")
        if inverted is not None and tensor(inverted.operands[0]).dtype is DType.I1:
            return inverted.operands[0]
        return build.aten("logical_not.default", {"self": self.condition}, tensor(self.condition))


def _masked(scores: Value) -> _Masked | None:
    """The outermost mask on `scores`, if there is one."""
    where = made_by(scores, "where.self", "where.ScalarOther", "where.ScalarSelf")
    if where is not None:
        return _masked_by_condition(where)
    fill = made_by(scores, "masked_fill.Scalar")
    if fill is not None:
        return _filled(fill.tensor("self"), fill.tensor("mask"), float(fill.argument("value")), True)
    added = made_by(scores, "add.Tensor")
    if added is None or added.argument("alpha") != 1:
        return None
    for inner, mask in both_orders(added):
        if tensor(inner) == tensor(scores) and _reaches_product(inner):
            return _Masked(inner, added=mask)
    return None


def _masked_by_condition(where: AtenOp) -> _Masked | None:
    condition = where.tensor("condition")
    branches: list[tuple[float | None, Value | None]] = []
    for name in ("self", "other"):
        values = where.tensors(name)
        if values:
            branches.append((number(values[0]), values[0]))
        else:
            branches.append((float(where.argument(name)), None))
    (yes_number, yes), (no_number, no) = branches
    if no_number is not None and yes is not None:
        return _filled(yes, condition, no_number, False)
    if yes_number is not None and no is not None:
        return _filled(no, condition, yes_number, True)
    return None


def _filled(scores: Value, condition: Value, fill: float, forbids: bool) -> _Masked | None:
    if not _reaches_product(scores):
        return None
    if fill == -math.inf or fill <= _HIDING:
        return _Masked(scores, condition=condition, forbids=forbids, fill=fill)
    return _Masked(scores, problem=f"masked scores become {fill}, which lets a little of them through")


def _reaches_product(scores: Value) -> bool:
    """Whether the way back over masks, softcap and scales ends in a matrix product."""
    for _ in range(16):
        if made_by(scores, "matmul.default", "bmm.default") is not None:
            return True
        op = made_by(
            scores, "mul.Scalar", "div.Scalar", "mul.Tensor", "div.Tensor", "tanh.default", "add.Tensor",
            "where.self", "where.ScalarOther", "where.ScalarSelf", "masked_fill.Scalar",
        )  # fmt: skip
        inner = [value for value in op.operands if shape(value) == shape(scores)] if op is not None else []
        if op is not None and op.name.startswith("aten.where"):
            inner = [value for value in inner if tensor(value).dtype is not DType.I1]
        if not inner:
            return False
        scores = inner[0]
    return False


def _softcapped(scores: Value) -> tuple[Value, float] | None:
    """(x, c) where `scores` is c * tanh(x / c)."""
    outer = scaled_by_number(scores)
    tanh = made_by(outer[0], "tanh.default") if outer is not None else None
    inner = scaled_by_number(tanh.tensor("self")) if tanh is not None else None
    if outer is None or inner is None or not math.isclose(outer[1] * inner[1], 1.0, rel_tol=1e-12):
        return None
    return inner[0], outer[1]


def _without_repetition(key: Value, value: Value) -> tuple[Value, Value]:
    """Keys and values before each head was repeated for its group of query heads."""
    one, other = _before_repetition(key), _before_repetition(value)
    if one is None or other is None or shape(one)[1] != shape(other)[1]:
        return key, value
    return one, other


def _before_repetition(value: Value) -> Value | None:
    """x [batch, Hk, T, D] where `value` [batch, Hk * n, T, D] repeats each head n times in a row."""
    view = is_view(value)
    if view is None:
        return None
    expand = made_by(view.operands[0], "expand.default")
    unsqueeze = made_by(expand.tensor("self"), "unsqueeze.default") if expand is not None else None
    if expand is None or unsqueeze is None:
        return None
    wide, source = shape(expand.result), unsqueeze.tensor("self")
    if len(wide) != 5 or unsqueeze.argument("dim") % 5 != 2 or len(shape(source)) != 4:
        return None
    batch, heads, length, width = shape(source)
    repeated = (wide[0], wide[1], wide[3], wide[4]) == (batch, heads, length, width)
    return source if repeated and shape(value) == (batch, wide[1] * wide[2], length, width) else None


@rewrite("aten.permute.default")
def merge_permutations(op: AtenOp, rewriter: Rewriter) -> bool:
    """permute(permute(x)) ==> permute(x), and the permutation that leaves all axes in place goes"""
    inner = made_by(op.tensor("self"), "permute.default", "transpose.int")
    if inner is None and permutation(op) != list(range(len(permutation(op)))):
        return False
    rewriter.replace(op, Builder(rewriter.insert).permute(op.tensor("self"), permutation(op)))
    return True


ATTENTION_PATTERNS = (raise_fused_attention, raise_attention, merge_permutations)
