"""Layers that patterns raise from aten because a backend has one kernel for them."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.definition import Attr, Op, Operand, OptionalOperand, Result, VariadicOperand, VariadicResult
from moec.ir.dimensions import symbol
from moec.ir.operation import Operation, Region, Value
from moec.ir.types import DType, TensorType, Type
from moec.ir.verifier import VerifyError

TOKENS = symbol("tokens")


def tensor_type(op: Operation, value: Value, what: str, rank: int | None = None) -> TensorType:
    """The tensor type of an operand; raises VerifyError where it is none or has another rank."""
    kind = value.type
    if not isinstance(kind, TensorType):
        raise VerifyError(f"{op.name}: {what} must be a tensor, not {kind}", op)
    if rank is not None and kind.rank != rank:
        raise VerifyError(f"{op.name}: {what} must have rank {rank}, not {kind}", op)
    return kind


class RMSNormOp(Op, name="nn.rms_norm", pure=True):
    """y = x / sqrt(mean(x^2, last axis) + epsilon) * (weight + offset); Zhang and Sennrich 2019, equation 4.

    `x` [..., H] float, `weight` [H]; `offset` is 1 in the Gemma family, whose weights are stored around zero.
    With `zero_sum`, x and y lack a last channel that is minus the sum of the others, and the mean of the squares is
    (sum(x^2) + sum(x)^2) / (H + 1); Jiang et al. 2023, section 3.3.
    """

    x = Operand()
    weight = OptionalOperand()
    y = Result()
    epsilon = Attr(float)
    offset = Attr(float, 0.0)
    zero_sum = Attr(bool, False)

    def infer(self) -> Sequence[Type]:
        kind = tensor_type(self, self.x, "x")
        if self.weight is not None and tensor_type(self, self.weight, "weight", 1).shape != kind.shape[-1:]:
            raise VerifyError(f"{self.name}: weight {self.weight.type} does not fit x {kind}", self)
        return [kind]


class LayerNormOp(Op, name="nn.layer_norm", pure=True):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis; Ba et al. 2016.

    `x` [..., H] float, `weight` and `bias` [H].
    """

    x = Operand()
    weight = OptionalOperand()
    bias = OptionalOperand()
    y = Result()
    epsilon = Attr(float)

    def infer(self) -> Sequence[Type]:
        kind = tensor_type(self, self.x, "x")
        for what, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None and tensor_type(self, value, what, 1).shape != kind.shape[-1:]:
                raise VerifyError(f"{self.name}: {what} {value.type} does not fit x {kind}", self)
        return [kind]


class RotaryOp(Op, name="nn.rotary", pure=True):
    """Rotary position embedding (Su et al. 2021) of the first R of D channels; the others pass through.

    `x` [batch, heads, seq, D]; `cos` and `sin` [batch or 1, seq, R]. With `interleaved` false the channel i pairs
    with i + R/2: y = x * cos + concat(-x2, x1) * sin. With `interleaved` true it pairs 2i with 2i+1: y[2i] = x[2i] *
    cos[2i] -
    x[2i+1] * sin[2i], y[2i+1] = x[2i+1] * cos[2i+1] + x[2i] * sin[2i+1].
    """

    x = Operand()
    cos = Operand()
    sin = Operand()
    y = Result()
    interleaved = Attr(bool, False)

    def infer(self) -> Sequence[Type]:
        x = tensor_type(self, self.x, "x", 4)
        cos, sin = tensor_type(self, self.cos, "cos", 3), tensor_type(self, self.sin, "sin", 3)
        rotated, width = cos.shape[2], x.shape[3]
        fits = cos == sin and cos.shape[1] == x.shape[2] and cos.shape[0] in (1, x.shape[0])
        if not fits or not isinstance(rotated, int) or not isinstance(width, int) or rotated > width or rotated % 2:
            raise VerifyError(f"{self.name}: cos {cos} and sin {sin} do not fit x {x}", self)
        return [x]


class AttentionMaskOp(Op, name="nn.attention_mask", pure=True):
    """Which key slots a query may see: a boolean tensor [batch, 1, S, T], true where it may.

    `padding` [batch, T] is 1 for tokens and 0 for padding. S and T are those of the result type; query i stands at
    slot T - S + i.
    `causal`: keys up to the query's slot. `window` > 0: only keys with query slot - key slot < window (on both sides
    without `causal`).
    `chunk` > 0: only keys whose position, counted without left padding, lies in the query's block of `chunk`.
    """

    padding = Operand()
    mask = Result()
    causal = Attr(bool)
    window = Attr(int, 0)
    chunk = Attr(int, 0)

    def verify_semantics(self) -> None:
        padding = tensor_type(self, self.padding, "padding", 2)
        mask = tensor_type(self, self.mask, "mask", 4)
        if (
            mask.dtype is not DType.I1
            or mask.shape[1] != 1
            or mask.shape[0] != padding.shape[0]
            or mask.shape[3] != padding.shape[1]
        ):
            raise VerifyError(f"{self.name}: mask {mask} does not fit padding {padding}", self)
        if self.window < 0 or self.chunk < 0 or (self.window and self.chunk):
            raise VerifyError(
                f"{self.name}: window {self.window} and chunk {self.chunk} exclude each other and are >= 0", self
            )


class AttentionOp(Op, name="nn.attention", pure=True):
    """Scaled dot-product attention with grouped heads: softmax(softcap(q k^T * scale) + mask) v.

    `query` [batch, Hq, S, D], `key` [batch, Hk, T, D], `value` [batch, Hk, T, Dv], Hk divides Hq; `mask` [batch or 1,
    Hq or 1, S, T], boolean (true = attend) or float (added); `sinks` [Hq] are logits that take part in the softmax
    and carry no value (gpt-oss). `softcap` c
    > 0: c * tanh(logits / c).
    `past_key` and `past_value` [batch, Hk, past, D] stand before `key` and `value`; then the results `present_key`
    and `present_value` are the whole cache. The first result is [batch, S, Hq, Dv].
    """

    query = Operand()
    key = Operand()
    value = Operand()
    mask = OptionalOperand()
    sinks = OptionalOperand()
    past_key = OptionalOperand()
    past_value = OptionalOperand()
    output = Result()
    present = VariadicResult()
    scale = Attr(float)
    softcap = Attr(float, 0.0)

    def infer(self) -> Sequence[Type]:
        query, key = tensor_type(self, self.query, "query", 4), tensor_type(self, self.key, "key", 4)
        value = tensor_type(self, self.value, "value", 4)
        heads, key_heads = query.shape[1], key.shape[1]
        if not isinstance(heads, int) or not isinstance(key_heads, int) or heads % key_heads:
            raise VerifyError(f"{self.name}: {key_heads} key heads do not divide {heads} query heads", self)
        if key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3] or key.shape[0] != query.shape[0]:
            raise VerifyError(f"{self.name}: query {query}, key {key} and value {value} do not fit", self)
        results: list[Type] = [TensorType((query.shape[0], query.shape[2], heads, value.shape[3]), query.dtype)]
        keys = key.shape[2]
        if (self.past_key is None) != (self.past_value is None):
            raise VerifyError(f"{self.name}: past_key and past_value come together", self)
        if self.past_key is not None and self.past_value is not None:
            for past, new in (
                (tensor_type(self, self.past_key, "past_key", 4), key),
                (tensor_type(self, self.past_value, "past_value", 4), value),
            ):
                if (past.shape[0], past.shape[1], past.shape[3]) != (new.shape[0], new.shape[1], new.shape[3]):
                    raise VerifyError(f"{self.name}: past {past} does not fit {new}", self)
                keys = past.shape[2] + new.shape[2]
                results.append(TensorType((new.shape[0], new.shape[1], keys, new.shape[3]), new.dtype))
        if self.mask is not None:
            mask = tensor_type(self, self.mask, "mask", 4)
            rows = mask.shape[0] in (1, query.shape[0]) and mask.shape[1] in (1, heads)
            if not rows or mask.shape[2] not in (1, query.shape[2]) or mask.shape[3] != keys:
                raise VerifyError(f"{self.name}: mask {mask} does not fit query {query} and {keys} keys", self)
        if self.sinks is not None and tensor_type(self, self.sinks, "sinks", 1).shape != (heads,):
            raise VerifyError(f"{self.name}: sinks {self.sinks.type} do not fit {heads} heads", self)
        return results


class MLPOp(Op, name="nn.mlp", pure=True, regions=1, isolated=True):
    """A dense feed-forward block. The region computes it on [tokens, H] from its weights, exactly as one expert of
    `moe.experts`."""

    x = Operand()
    weights = VariadicOperand()
    y = Result()

    def infer(self) -> Sequence[Type]:
        x = tensor_type(self, self.x, "x")
        verify_body(self, self.regions[0], x, [value.type for value in self.weights])
        return [x]


def verify_body(op: Operation, region: Region, x: TensorType, weights: Sequence[Type]) -> None:
    """Checks the body of an expert or dense block: [tokens, H] and weights in, [tokens, H] out; raises VerifyError."""
    tokens = TensorType((TOKENS, x.shape[-1]), x.dtype)
    expected = [tokens, *weights]
    actual = [argument.type for argument in region.block.arguments]
    if actual != expected:
        raise VerifyError(
            f"{op.name}: the body takes ({', '.join(map(str, actual))}), expected ({', '.join(map(str, expected))})", op
        )
    last = region.block.last
    if last is None or last.name != "moe.yield" or [value.type for value in last.operands] != [tokens]:
        raise VerifyError(f"{op.name}: the body must end in moe.yield of one {tokens}", op)
