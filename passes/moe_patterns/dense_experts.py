"""Experts that a model computes for every token, on inputs that are zero where the router did not choose them.

Llama 4 multiplies tokens by their scores before the experts, and sums all of them. An expert that maps zero to zero
then gives something only to the tokens that chose it: this is `moe.experts` on chosen tokens times scores, with gates
of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moec.dialects import aten
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertClass, ExpertsOp, YieldOp
from moec.dialects.nn import TOKENS
from moec.ir import Block, Operation, Region, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import is_last_axis, is_view, made_by, same, shape, tensor

# They give zero for zero.
_KEEP_ZERO = frozenset(
    f"aten.{name}"
    for name in ("silu.default", "gelu.default", "relu.default", "tanh.default", "mul.Scalar", "neg.default")
)
_SPLITS = frozenset({"aten.split_with_sizes.default", "aten.split.Tensor", "aten.chunk.default", "aten.slice.Tensor"})


@dataclass(frozen=True)
class DenseExperts:
    """`total` [T, H] sums experts over `tokens` [T, H] times scores. The scores of a token are the sigmoid of the best
    `values` [T, k] of its logits, for the experts `ids` [T, k], and zero for the others."""

    total: AtenOp
    tokens: Value
    ids: Value
    values: Value
    computation: Computation


@dataclass
class Computation:
    """The operations of all experts at once, from `source` [E, T, H] on; `last` gives [E, T, H]."""

    last: AtenOp
    found: dict[AtenOp, None] = field(default_factory=dict)
    source: Value | None = None

    def collect(self, value: Value) -> bool:
        """Adds what computes `value`; False where it is not computed from products of one source with weights."""
        op = value.defining_op
        if not isinstance(op, AtenOp):
            return False
        if op in self.found:
            return True
        self.found[op] = None
        if op.name == "aten.bmm.default":
            source, weight = op.tensor("self"), op.tensor("mat2")
            if self.source is None:
                self.source = source
            return self.source is source and isinstance(weight.defining_op, WeightOp)
        known = op.name in _KEEP_ZERO or (op.name in _SPLITS and is_last_axis(op))
        if known:
            return self.collect(op.operands[0])
        return op.name == "aten.mul.Tensor" and all(
            shape(operand)[:2] == shape(value)[:2] and self.collect(operand) for operand in op.operands
        )

    def stacks(self) -> list[Value]:
        """The weights [E, in, out], in the order in which tokens meet them."""
        products = [op for op in self._ordered() if op.name == "aten.bmm.default"]
        return [op.tensor("mat2") for op in products]

    def _ordered(self) -> list[AtenOp]:
        block = self.last.parent
        return [op for op in block if isinstance(op, AtenOp) and (op in self.found or op is self.last)] if block else []

    def region(self) -> Region:
        """The body of one expert."""
        stacks = self.stacks()
        assert self.source is not None
        tokens = TensorType((TOKENS, shape(self.source)[-1]), tensor(self.source).dtype)
        block = Block([tokens, *[TensorType(shape(stack)[1:], tensor(stack).dtype) for stack in stacks]])
        mapping: dict[Value, Value] = {self.source: block.arguments[0]}
        mapping.update(zip(stacks, block.arguments[1:], strict=True))
        for op in self._ordered():
            kinds = [TensorType((TOKENS, shape(result)[-1]), tensor(result).dtype) for result in op.results]
            if op.name == "aten.bmm.default":
                weight = mapping[op.tensor("mat2")]
                flipped = TensorType(shape(weight)[::-1], tensor(weight).dtype)
                transposed = aten.build("permute.default", {"self": weight}, (flipped,), op.location, dims=(1, 0))
                block.append(transposed)
                given: dict[str, Value | tuple[Value, ...]] = {
                    "input": mapping[op.tensor("self")],
                    "weight": transposed.result,
                }
                copy: Operation = aten.build("linear.default", given, (kinds[0],), op.location)
            else:
                attributes = {**op.attributes, **({"dim": -1} if op.name in _SPLITS else {})}
                copy = Operation.create(
                    op.name, [mapping[value] for value in op.operands], kinds, attributes, [], op.location
                )
            block.append(copy)
            mapping.update(zip(op.results, copy.results, strict=True))
        block.append(YieldOp([mapping[self.last.result]], result_types=[], location=self.last.location))
        return Region(block)


def find_dense_experts(total: AtenOp) -> DenseExperts | None:
    """What a `sum.dim_IntList` adds up, if it is the experts of every token."""
    if total.argument("dim") != (0,) or total.argument("keepdim") or len(shape(total.operands[0])) != 3:
        return None
    last = made_by(_unviewed(total.operands[0]), "bmm.default")
    if last is None or not isinstance(last.tensor("mat2").defining_op, WeightOp):
        return None
    computation = Computation(last)
    if not computation.collect(last.tensor("self")) or computation.source is None:
        return None
    product = made_by(_unviewed(computation.source), "mul.Tensor")
    repeat = made_by(product.tensor("self"), "repeat.default") if product is not None else None
    if product is None or repeat is None:
        return None
    tokens = repeat.tensor("self")
    experts = shape(last.tensor("mat2"))[0]
    flipped = made_by(_unviewed(product.tensor("other")), "permute.default", "transpose.int")
    if flipped is None or repeat.argument("repeats") != (experts, 1) or len(shape(tokens)) != 2:
        return None
    scores = flipped.tensor("self")
    if shape(scores) != (shape(tokens)[0], experts) or shape(product.tensor("other"))[-1] != 1:
        return None
    chosen = _chosen(scores)
    fits = shape(total.result) == shape(tokens) and shape(computation.source)[0] == experts
    return DenseExperts(total, tokens, *chosen, computation) if chosen is not None and fits else None


def _chosen(scores: Value) -> tuple[Value, Value] | None:
    """(ids, values) where scores are the sigmoid of the best logits, and of -inf elsewhere."""
    sigmoid = made_by(scores, "sigmoid.default")
    scatter = made_by(sigmoid.tensor("self"), "scatter.src") if sigmoid is not None else None
    if scatter is None or not is_last_axis(scatter):
        return None
    background = made_by(scatter.tensor("self"), "full_like.default", "full.default")
    best = made_by(scatter.tensor("index"), "topk.default")
    if background is None or background.argument("fill_value") != -math.inf or best is None:
        return None
    values = scatter.tensor("src")
    aligned = scatter.tensor("index") is best.results[1] and same(values, best.results[0])
    return (best.results[1], values) if aligned else None


def make_sparse(dense: DenseExperts, ids: Value, scores: Value) -> ExpertsOp:
    """`moe.experts` on tokens times `scores` [T, k], before the sum, which it replaces."""
    count = shape(dense.computation.last.tensor("mat2"))[0]
    assert isinstance(count, int)
    build = Builder(lambda op: op.insert_before(dense.total))
    (length, width), slots = shape(dense.tokens), shape(ids)[1]
    wide = TensorType((length, slots, width), tensor(dense.tokens).dtype)
    factors = {"self": build.unsqueeze(dense.tokens, 1), "other": build.unsqueeze(scores, 2)}
    scaled = build.view(build.aten("mul.Tensor", {**factors}, wide), (length * slots, width))
    ones_kind = TensorType((length * slots, 1), tensor(scores).dtype)
    ones = build.aten("ones.default", {}, ones_kind, size=ones_kind.shape, dtype=ones_kind.dtype)
    everyone = tuple(range(count))
    stacks = dense.computation.stacks()
    experts = ExpertsOp(
        scaled,
        build.view(ids, (length * slots, 1)),
        ones,
        stacks,
        regions=[dense.computation.region()],
        stored=everyone,
        classes=(ExpertClass(everyone, len(stacks)),),
        location=dense.computation.last.location,
    )
    build.insert(experts)
    result = experts.y
    if slots != 1:
        kind = TensorType((length, width), tensor(experts.y).dtype)
        given = build.view(experts.y, (length, slots, width))
        dense.total.replace_with([build.aten("sum.dim_IntList", {"self": given}, kind, dim=(1,))])
    else:
        dense.total.replace_with([result])
    return experts


def _unviewed(value: Value) -> Value:
    while (view := is_view(value)) is not None:
        value = view.operands[0]
    return value
