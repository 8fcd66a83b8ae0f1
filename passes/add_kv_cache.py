"""Key/value cache: a decoder that sees only new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from moec.dialects import aten
from moec.dialects.builtin import FuncOp, ModuleOp, ReturnOp
from moec.dialects.nn import AttentionMaskOp, AttentionOp
from moec.ir import BlockArgument, DimExpr, DType, Operation, TensorType, Value, symbol
from moec.passes.building import Builder
from moec.passes.matching import is_view, made_by, shape, tensor
from moec.passes.token_locality import Obstacle, find_obstacle, is_ones
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_PAST = "past"
_TOKENS_INPUT, _PADDING_INPUT = "input_ids", "attention_mask"


@register_pass("add-kv-cache")
@dataclass(frozen=True)
class AddKVCache(Pass):
    """Gives a decoder keys and values of earlier tokens as inputs, and those of all tokens as results.

    1. `attention_mask` becomes [batch, past + seq]; the other inputs are those of the new tokens.
    2. Each attention gets `past_key_values.N.key` and `.value` [batch, key heads, past, channels] and gives
       `present.N.key` and `.value`; N counts them in order of depth. Layers that share keys and values share a cache.
    3. With `equal_widths`, the narrower of keys and values gets zeros for its missing channels (DeepSeek's values,
       whose keys have rotary channels too): ONNX Runtime GenAI knows one width for both.
    4. Nothing else changes. So a model in which tokens meet anywhere but in causal attention, or which counts
       positions by itself, is left without a cache, with the reason.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    cached = Statistic("attentions with a cache")
    widened = Statistic("attentions whose keys or values got channels of zeros")
    equal_widths: bool = option("give the caches of keys and values the same width", True)

    def run(self, op: Operation, context: PassContext) -> None:
        assert isinstance(op, ModuleOp)
        function = op.main
        obstacle = _obstacle(function)
        if obstacle is not None:
            context.refuse(obstacle.op, obstacle.reason, self.pass_name)
            return
        if self.equal_widths:
            context.count(self.widened, _equalize_widths(function))
        context.count(self.cached, _Cache(function).add())


def _obstacle(function: FuncOp) -> Obstacle | None:
    """What keeps the function from having a cache."""
    if _TOKENS_INPUT not in function.arg_names:
        return Obstacle(function, f"it has no input {_TOKENS_INPUT}")
    tokens = shape(function.argument(_TOKENS_INPUT))
    length = tokens[1] if len(tokens) == 2 else None
    if not isinstance(length, DimExpr) or len(length.symbols()) != 1:
        return Obstacle(function, f"{_TOKENS_INPUT} is not [batch, seq] with a symbol for seq")
    if any(_PAST in tensor(argument).symbols() for argument in function.arguments):
        return Obstacle(function, "it has a cache already")
    attentions = [op for op in function.body if isinstance(op, AttentionOp)]
    if not attentions:
        return Obstacle(function, "it has no attention")
    for attention in attentions:
        reason = _uncachable(attention, function, length)
        if reason:
            return Obstacle(attention, reason)
    if _PADDING_INPUT in function.arg_names:
        other = _other_user(function.argument(_PADDING_INPUT))
        if other is not None:
            return Obstacle(other, f"{_PADDING_INPUT} is used for something else than attention")
    return find_obstacle(function, next(iter(length.symbols())))


def _uncachable(attention: AttentionOp, function: FuncOp, length: DimExpr) -> str:
    for value in (attention.query, attention.key, attention.value):
        if shape(value)[2] != length or shape(value)[0] != shape(function.argument(_TOKENS_INPUT))[0]:
            return f"its operands are not of [batch, heads, {length}, channels]"
    mask = attention.mask.defining_op if attention.mask is not None else None
    if not isinstance(mask, AttentionMaskOp):
        return "it has no mask" if attention.mask is None else "its mask is computed"
    if not mask.causal:
        return "it is not causal"
    padding = _source(mask.padding)
    if is_ones(padding) is None and padding not in function.arguments:
        return "the padding of its mask is computed"
    return ""


def _other_user(padding: Value) -> Operation | None:
    """The first operation that reads the padding mask, or a view or cast of it, and is no attention mask."""
    for user in padding.users:
        if isinstance(user, AttentionMaskOp) or not (user.has_uses or not user.pure):
            continue
        copied = is_view(user.results[0]) or made_by(user.results[0], "_to_copy.default") if user.results else None
        if copied is None or shape(user.results[0]) != shape(padding):
            return user
        other = _other_user(user.results[0])
        if other is not None:
            return other
    return None


def _source(padding: Value) -> Value:
    """The padding mask behind views and casts."""
    while (op := is_view(padding) or made_by(padding, "_to_copy.default")) is not None:
        padding = op.operands[0]
    return padding


def _equalize_widths(function: FuncOp) -> int:
    """Makes keys and values of each attention equally wide; returns how many were not."""
    made: dict[Value, Value] = {}
    count = 0
    for attention in [op for op in function.body if isinstance(op, AttentionOp)]:
        key_width, value_width = shape(attention.key)[3], shape(attention.value)[3]
        if key_width == value_width or not isinstance(key_width, int) or not isinstance(value_width, int):
            continue
        count += 1
        width = max(key_width, value_width)
        build = Builder(partial(Operation.insert_before, anchor=attention))
        for old in (attention.query, attention.key, attention.value):
            if old not in made:  # layers that share keys and values go on to share them
                made[old] = build.widen_channels(old, width)
        wider = AttentionOp(
            made[attention.query],
            made[attention.key],
            made[attention.value],
            attention.mask,
            attention.sinks,
            scale=attention.scale,
            softcap=attention.softcap,
            location=attention.location,
        )
        wider.insert_before(attention)
        attention.replace_with([build.channels(wider.output, 0, value_width)])
    return count


@dataclass
class _Cache:
    function: FuncOp

    def add(self) -> int:
        """Rewrites the function; gives the number of attentions."""
        self._lengthen_masks()
        attentions = [op for op in self.function.body if isinstance(op, AttentionOp)]
        pasts: dict[tuple[Value, Value], tuple[Value, Value]] = {}
        presents: list[Value] = []
        argument_names, result_names = list(self.function.arg_names), list(self.function.result_names)
        for attention in attentions:
            pair = (attention.key, attention.value)
            known = pasts.get(pair)
            past = known or (self._argument(attention.key), self._argument(attention.value))
            pasts[pair] = past
            cached = _with_past(attention, *past)
            if known is None:
                names = [f"{len(pasts) - 1}.{part}" for part in ("key", "value")]
                argument_names += [f"past_key_values.{name}" for name in names]
                result_names += [f"present.{name}" for name in names]
                presents += cached.present
        old = self.function.return_op
        returned = ReturnOp([*old.operands, *presents], result_types=[], location=old.location)
        old.erase()
        self.function.body.append(returned)
        self.function.arg_names, self.function.result_names = tuple(argument_names), tuple(result_names)
        self.function.update_type()
        return len(attentions)

    def _argument(self, new: Value) -> BlockArgument:
        batch, heads, _, width = shape(new)
        return self.function.body.add_argument(TensorType((batch, heads, symbol(_PAST), width), tensor(new).dtype))

    def _lengthen_masks(self) -> None:
        """Padding and masks over the tokens of the cache and the new ones."""
        if _PADDING_INPUT in self.function.arg_names:
            padding = self.function.argument(_PADDING_INPUT)
            padding.type = _lengthened(tensor(padding), 1)
        for mask in [op for op in self.function.body if isinstance(op, AttentionMaskOp)]:
            source = _source(mask.padding)
            ones = is_ones(source)
            if ones is not None and tensor(source).shape[1] == tensor(mask.mask).shape[3]:
                kind = _lengthened(tensor(source).with_dtype(DType.I64), 1)
                longer = aten.build("ones.default", {}, (kind,), mask.location, size=kind.shape, dtype=kind.dtype)
                longer.insert_before(mask)
                source = longer.result
            mask.set_operand(0, source)
            mask.mask.type = _lengthened(tensor(mask.mask), 3)


def _lengthened(kind: TensorType, axis: int) -> TensorType:
    sizes = list(kind.shape)
    sizes[axis] = sizes[axis] + symbol(_PAST)
    return TensorType(tuple(sizes), kind.dtype)


def _with_past(attention: AttentionOp, past_key: Value, past_value: Value) -> AttentionOp:
    cached = AttentionOp(
        attention.query,
        attention.key,
        attention.value,
        attention.mask,
        attention.sinks,
        past_key,
        past_value,
        scale=attention.scale,
        softcap=attention.softcap,
        location=attention.location,
    )
    cached.insert_before(attention)
    attention.replace_with([cached.output])
    return cached
