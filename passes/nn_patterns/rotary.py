"""Rotary position embedding: every spelling is read as pairs of channels that turn by an angle.

A turn gives (x1 cos - x2 sin, x2 cos + x1 sin). Pairs come as halves (channel i with i + R/2) or interleaved (2i with
2i + 1), the two results are put together in one of the same two ways, and cosines stand once for each pair or once for
each channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moec.dialects.aten import AtenOp
from moec.dialects.nn import RotaryOp
from moec.ir import DimExpr, Value
from moec.passes.building import Builder
from moec.passes.matching import Part, both_orders, is_last_axis, is_view, made_by, part, same, shape, tensor
from moec.rewrite import Rewriter, rewrite

Sizes = tuple[int | DimExpr, ...]


@dataclass(frozen=True)
class _Pairs:
    """Where the two channels of each pair lie: `width` channels, from `start` on, of `base` seen with shape `sizes`."""

    base: Value
    sizes: Sizes
    start: int
    width: int
    interleaved: bool


@dataclass(frozen=True)
class _Turn:
    """One value turned. `cos` and `sin` have one channel for each pair."""

    pairs: _Pairs
    cos: Value
    sin: Value


@rewrite("aten.cat.default", "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", benefit=2)
def raise_rotary_pairs(op: AtenOp, rewriter: Rewriter) -> bool:
    """concat or interleave of (x1 cos - x2 sin, x2 cos + x1 sin) ==> rotary(x)"""
    joined = _joined(op.result)
    if joined is None:
        return False
    first, second, interleaved = joined
    turn = _turn(first, second)
    if turn is None:
        return False
    pairs = turn.pairs
    if not tensor(pairs.base).dtype is tensor(turn.cos).dtype is tensor(op.result).dtype:
        return rewriter.refuse(op, f"it multiplies {pairs.base.type} by {turn.cos.type}")
    if interleaved and not pairs.interleaved:
        return rewriter.refuse(op, "it takes pairs from halves and gives them interleaved")
    frame = _frame(pairs.sizes, turn.cos, turn.sin)
    if frame is None:
        return rewriter.refuse(op, f"cos {turn.cos.type} and sin {turn.sin.type} do not fit x {pairs.sizes}")
    build = Builder(rewriter.insert)
    x = build.channels(build.view(pairs.base, pairs.sizes), pairs.start, pairs.width)
    if pairs.interleaved and not interleaved:
        half = pairs.width // 2
        last = len(shape(x)) - 1
        x = build.concat([build.channels(x, 0, half, 2), build.channels(x, 1, half, 2)], last)
    cos, sin = (frame.angles(build, value) for value in (turn.cos, turn.sin))
    if interleaved:
        cos, sin = build.repeat_channels(cos), build.repeat_channels(sin)
    else:
        cos, sin = build.concat([cos, cos], 2), build.concat([sin, sin], 2)
    rewriter.replace(op, build.view(frame.rotate(build, x, cos, sin, interleaved), shape(op.result)))
    return True


@rewrite("aten.add.Tensor", benefit=2)
def raise_rotary(op: AtenOp, rewriter: Rewriter) -> bool:
    """x * cos + rotated(x) * sin ==> rotary(x), where rotated pairs channels and negates the second of each"""
    if op.argument("alpha") != 1:
        return False
    for left, right in both_orders(op):
        plain, turned = made_by(left, "mul.Tensor"), made_by(right, "mul.Tensor")
        if plain is None or turned is None:
            continue
        for rotated, sin in both_orders(turned):
            pairs = _rotated(rotated)
            if pairs is None:
                continue
            for x, cos in both_orders(plain):
                if not _is_all_of(x, pairs):
                    continue
                frame = _frame(shape(x), cos, sin)
                if frame is None or tensor(op.result) != tensor(x):
                    return rewriter.refuse(op, f"cos {cos.type} and sin {sin.type} do not fit x {x.type}")
                build = Builder(rewriter.insert)
                angles = [frame.angles(build, value) for value in (cos, sin)]
                rewriter.replace(op, frame.rotate(build, x, angles[0], angles[1], pairs.interleaved))
                return True
    return False


@rewrite("aten.cat.default")
def widen_partial_rotary(op: AtenOp, rewriter: Rewriter) -> bool:
    """concat(rotary(x[:R]), x[R:]) ==> rotary(x), which lets the channels from R on pass"""
    values = [value for value in op.tensors("tensors") if shape(value)[-1] != 0]
    if not is_last_axis(op) or not values:
        return False
    if len(values) == 1 and tensor(values[0]) == tensor(op.result):
        # all channels turn, and the ones behind them are an empty slice
        rewriter.replace(op, values[0])
        return True
    if len(values) != 2:
        return False
    rotary = values[0].defining_op
    rest = part(values[1])
    if not isinstance(rotary, RotaryOp) or rest is None or not rotary.y.has_one_use:
        return False
    head = part(rotary.x)
    rotated = shape(rotary.x)[-1]
    if head is None or (head.base, head.sizes) != (rest.base, rest.sizes) or head.start != 0 or rest.start != rotated:
        return False
    if head.step != 1 or rest.step != 1 or tensor(rest.base) != tensor(op.result):
        return False
    rewriter.replace_with(op, RotaryOp(rest.base, rotary.cos, rotary.sin, interleaved=rotary.interleaved))
    return True


def _joined(value: Value) -> tuple[Value, Value, bool] | None:
    """(first, second, interleaved) where `value` puts two values of half its width together."""
    cat = made_by(value, "cat.default")
    if cat is not None:
        values = cat.tensors("tensors")
        if len(values) == 2 and is_last_axis(cat) and tensor(values[0]) == tensor(values[1]):
            return values[0], values[1], False
        return None
    view = is_view(value)
    if view is None:
        return None
    pairs = view.operands[0]
    if shape(pairs)[-1:] != (2,):
        return None
    stack = made_by(pairs, "stack.default")
    if stack is not None and stack.argument("dim") in (-1, len(shape(pairs)) - 1):
        values = stack.tensors("tensors")
        return (values[0], values[1], True) if len(values) == 2 else None
    cat = made_by(pairs, "cat.default")
    if cat is None or not is_last_axis(cat) or len(cat.tensors("tensors")) != 2:
        return None
    found = [made_by(item, "unsqueeze.default") for item in cat.tensors("tensors")]
    halves = [op.tensor("self") for op in found if op is not None and op.argument("dim") in (-1, len(shape(pairs)) - 1)]
    return (halves[0], halves[1], True) if len(halves) == 2 else None


def _rotated(value: Value) -> _Pairs | None:
    """The pairs of which `value` holds (-second, first)."""
    joined = _joined(value)
    if joined is not None and joined[2] and shape(joined[0])[:-1] != shape(value)[:-1]:
        return None
    negated = made_by(joined[0], "neg.default") if joined is not None else None
    if joined is None or negated is None:
        return None
    pairs = _pairs(joined[1], negated.tensor("self"))
    return pairs if pairs is not None and pairs.interleaved == joined[2] else None


def _pairs(first: Value, second: Value) -> _Pairs | None:
    one, other = part(first), part(second)
    if one is None or other is None or (one.base, one.sizes) != (other.base, other.sizes):
        return None
    if (one.count, one.step) != (other.count, other.step):
        return None
    if one.step == 1 and other.start == one.start + one.count:
        return _Pairs(one.base, one.sizes, one.start, 2 * one.count, False)
    if one.step == 2 and other.start == one.start + 1:
        return _Pairs(one.base, one.sizes, one.start, 2 * one.count, True)
    return None


def _is_all_of(x: Value, pairs: _Pairs) -> bool:
    """Whether `x` holds exactly the channels of the pairs, in their order."""
    if x is pairs.base:
        return pairs.sizes == shape(x) and pairs.start == 0 and pairs.width == shape(x)[-1]
    return part(x) == Part(pairs.base, pairs.sizes, pairs.start, pairs.width)


def _turn(first: Value, second: Value) -> _Turn | None:
    """The turn whose results are `first` and `second`."""
    difference, total = made_by(first, "sub.Tensor"), made_by(second, "add.Tensor")
    if difference is None or total is None or difference.argument("alpha") != 1 or total.argument("alpha") != 1:
        return None
    for x1, cos in _factors(difference.tensor("self")):
        for x2, sin in _factors(difference.tensor("other")):
            pairs = _pairs(x1, x2)
            if pairs is None:
                continue
            for left, right in both_orders(total):
                if _is_product(left, x2, cos) and _is_product(right, x1, sin):
                    return _Turn(pairs, cos, sin)
    return None


def _factors(value: Value) -> Iterator[tuple[Value, Value]]:
    product = made_by(value, "mul.Tensor")
    return both_orders(product) if product is not None else iter(())


def _is_product(value: Value, first: Value, second: Value) -> bool:
    return any(same(one, first) and same(other, second) for one, other in _factors(value))


@dataclass(frozen=True)
class _Frame:
    """How x [batch, heads, seq, D], [batch, seq, heads, D] or [batch, seq, D] and its angles are laid out."""

    heads_axis: int | None
    angles_rank: int

    def angles(self, build: Builder, value: Value) -> Value:
        """`value` as [batch or 1, seq, R]."""
        while len(shape(value)) < self.angles_rank:
            value = build.unsqueeze(value, 0)
        return value if self.heads_axis is None else build.squeeze(value, self.heads_axis)

    def rotate(self, build: Builder, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
        """rotary in the layout of x."""
        swapped = (0, 2, 1, 3)
        if self.heads_axis is None:
            x = build.unsqueeze(x, 1)
        elif self.heads_axis == 2:
            x = build.permute(x, swapped)
        y = build.insert(RotaryOp(x, cos, sin, interleaved=interleaved))
        if self.heads_axis is None:
            return build.squeeze(y, 1)
        return build.permute(y, swapped) if self.heads_axis == 2 else y


def _frame(sizes: Sizes, cos: Value, sin: Value) -> _Frame | None:
    if tensor(cos) != tensor(sin):
        return None
    rank = len(sizes)
    angles = (1,) * (rank - len(shape(cos))) + shape(cos)
    if len(angles) != rank or angles[0] not in (1, sizes[0]):
        return None
    if rank == 3:
        return _Frame(None, 3) if angles[1] == sizes[1] else None
    if rank != 4:
        return None
    if angles[1] == 1 and angles[2] == sizes[2]:
        return _Frame(1, 4)
    if angles[2] == 1 and angles[1] == sizes[1]:
        return _Frame(2, 4)
    return None


ROTARY_PATTERNS = (raise_rotary_pairs, raise_rotary, widen_partial_rotary)
