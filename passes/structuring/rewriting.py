"""Replaces a linear map by the operations that multiply by its factors."""

from __future__ import annotations

import torch

from moec.dialects import aten
from moec.dialects.nn import TOKENS
from moec.experts.parts import erase_unused, new_weight, store_unrounded
from moec.ir import DimExpr, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import shape, tensor
from moec.passes.norm_folding.linear_maps import LinearMap, add_operand, drop_unused
from moec.passes.structuring.factors import Factors
from moec.weights.context import WeightContext
from moec.weights.tensor_spec import TensorSpec


def replace_by_factors(found: LinearMap, factors: Factors, weights: WeightContext, guide: float) -> None:
    """Writes guide * W x + (1 - guide) * S x + b in place of W x + b, S being the product of the factors."""
    op = found.op
    build = Builder(lambda new: new.insert_before(op))
    x, kind = found.input, tensor(op.results[0])
    structured = _multiplied(found, factors, weights, build, x)
    result = structured
    if guide:
        plain = aten.build("linear.default", {"input": x, "weight": _matrix(found, build)}, (kind,), op.location)
        whole = build.aten("mul.Scalar", {"self": build.insert(plain)}, kind, other=guide)
        rest = build.aten("mul.Scalar", {"self": structured}, kind, other=1 - guide)
        result = build.aten("add.Tensor", {"self": whole, "other": rest}, kind)
    if found.bias is not None:
        result = build.aten("add.Tensor", {"self": result, "other": _bias(found)}, kind)
    makers = [value.defining_op for value in op.operands]
    op.replace_with([result])
    for maker in makers:
        if maker is not None:
            erase_unused(maker)
    if found.weight.holder is not None:
        drop_unused(*found.weight.holder)


def _bias(found: LinearMap) -> Value:
    return found.op.tensor("bias" if found.op.name == "aten.linear.default" else "self")


def _matrix(found: LinearMap, build: Builder) -> Value:
    """The old matrix as [out, in]."""
    names = {"aten.linear.default": "weight", "aten.matmul.default": "other"}
    value = found.op.tensor(names.get(found.op.name, "mat2"))
    return value if found.op.name == "aten.linear.default" else build.permute(value, (1, 0))


def _multiplied(found: LinearMap, factors: Factors, weights: WeightContext, build: Builder, x: Value) -> Value:
    """left right x: dense factors are linear maps, block-diagonal ones products of batches of matrices."""
    kind = tensor(x)
    blocks, inner, inputs = factors.right.shape
    groups, outputs, width = factors.left.shape
    tokens: int | DimExpr = 1
    for size in kind.shape[:-1]:
        tokens = tokens * size
    tokens = TOKENS if found.weight.holder is not None else tokens
    rows = build.view(x, (tokens, shape(x)[-1]))
    right = factors.right[0] if blocks == 1 else factors.right.transpose(1, 2)
    left = factors.left[0] if groups == 1 else factors.left.transpose(1, 2)
    right_value, left_value = (
        _weight(found, name, numbers, weights) for name, numbers in (("right", right), ("left", left))
    )
    if blocks == 1:
        middle = build.aten("linear.default", {"input": rows, "weight": right_value}, _type(kind, tokens, inner))
    else:
        cut = build.permute(build.view(rows, (tokens, blocks, inputs)), (1, 0, 2))
        each = build.aten("bmm.default", {"self": cut, "mat2": right_value}, _type(kind, blocks, tokens, inner))
        middle = each if groups > 1 else build.view(build.permute(each, (1, 0, 2)), (tokens, blocks * inner))
    if groups == 1:
        result = build.aten("linear.default", {"input": middle, "weight": left_value}, _type(kind, tokens, outputs))
    else:
        # [blocks, tokens, groups, r] to [groups, tokens, blocks * r]
        parted = build.view(middle, (blocks, tokens, groups, inner // groups))
        turned = build.view(build.permute(parted, (2, 1, 0, 3)), (groups, tokens, width))
        each = build.aten("bmm.default", {"self": turned, "mat2": left_value}, _type(kind, groups, tokens, outputs))
        result = build.view(build.permute(each, (1, 0, 2)), (tokens, groups * outputs))
    return build.view(result, shape(found.op.results[0]))


def _type(like: TensorType, *sizes: int | DimExpr) -> TensorType:
    return TensorType(tuple(sizes), like.dtype)


def _weight(found: LinearMap, name: str, numbers: torch.Tensor, weights: WeightContext) -> Value:
    """A factor as a value that the operation may read."""
    old = found.weight.weight
    dtype = tensor(old.value).dtype
    spec = TensorSpec(tuple(numbers.shape), torch.float64)
    source = store_unrounded(weights, spec, [numbers.contiguous()], dtype)
    full = f"{old.weight_name.removesuffix('.weight')}.{name}"
    value = new_weight(found.anchor, full, source, spec.shape, dtype)
    return value if found.weight.holder is None else add_operand(*found.weight.holder, value, False)
