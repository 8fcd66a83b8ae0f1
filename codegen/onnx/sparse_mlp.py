"""`nn.mlp` in which a token uses few neurons: one token reads the weights of those alone, several run all and a mask.

What a run of one token costs is the reading of weights. The branch for it computes what the choice of neurons needs,
takes the rows of the other matrices that belong to the chosen ones, and goes on with these. Measured at hidden size
1024 and width 4096 (one thread): at 8 % of the neurons 2.2 times as fast as the dense block where the choice reads the
whole gate, 7 times where a map of rank 128 foretells it; at 25 % nothing is gained, since taken rows are written once
and read twice. Tokens side by side choose different neurons, so that together they need nearly all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import onnx_ir as ir

from moec.codegen.onnx.context import Context, tensor_of
from moec.codegen.onnx.registry import emit_block, emit_operation
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ConstantOp, WeightOp
from moec.dialects.nn import MLPOp
from moec.dialects.quant import DequantOp
from moec.ir import Block, BlockArgument, Operation, Value
from moec.ir.types import DType

# above it, taking rows costs more than it saves
_LARGEST_SHARE = 0.2

# what computes an element of its result from the same element of its operands, and numbers
_POINTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "abs.default", "add.Scalar", "add.Tensor", "clamp.default", "div.Scalar", "div.Tensor", "erf.default",
        "exp.default", "gelu.default", "leaky_relu.default", "mul.Scalar", "mul.Tensor", "neg.default",
        "pow.Tensor_Scalar", "relu.default", "sigmoid.default", "silu.default", "square.default", "sub.Scalar",
        "sub.Tensor", "tanh.default",
    )
)  # fmt: skip


@dataclass(frozen=True)
class SparseMlp:
    """`choice` [tokens, k] are numbers of neurons, or [tokens, m] whether each is used; `hidden` [tokens, m] is what
    they do, before those that are not used become zero; `last` multiplies by down. `needed`: what leads to the choice.
    """

    choice: Value
    hidden: Value
    last: AtenOp
    needed: frozenset[Operation]

    def is_taken(self, op: Operation) -> bool:
        """Whether an operation that leads to `hidden` runs for the chosen neurons alone."""
        return op not in self.needed and tensor_of(op.results[0]).shape[-1:] == tensor_of(self.hidden).shape[-1:]


def find_sparse(context: Context, op: MLPOp) -> SparseMlp | None:
    """The block taken apart; None where all neurons count, or too many of them."""
    last = op.regions[0].block.terminator.operands[0].defining_op
    packed = any(isinstance(inner, DequantOp) for inner in op.regions[0].block)
    if not isinstance(last, AtenOp) or last.name != "aten.linear.default" or packed:
        return None
    masked = last.tensor("input").defining_op
    if not isinstance(masked, AtenOp):
        return None
    found = _by_numbers(masked) or _by_threshold(masked)
    if found is None or found[1] > _LARGEST_SHARE:
        return None
    sparse = SparseMlp(found[0], masked.tensor("self"), last, frozenset(_leading_to(found[0])))
    weights = [last.tensor("weight")]
    for inner in _leading_to(sparse.hidden):
        if not sparse.is_taken(inner):
            continue
        if not isinstance(inner, AtenOp) or inner.name not in (*_POINTWISE, "aten.linear.default"):
            return None
        if inner.name == "aten.linear.default":
            weights.append(inner.tensor("weight"))
    return sparse if all(context.named_weight(_outside(op, weight)) is not None for weight in weights) else None


def emit_sparse(context: Context, op: MLPOp, sparse: SparseMlp, rows: ir.Value) -> ir.Value:
    """The block on rows [T, H], by the number of rows."""
    b = context.builder
    single = b.op("Squeeze", b.op("Equal", b.size(rows, 0), b.ints(1)), b.ints(0))
    taken = [inner for inner in _leading_to(sparse.hidden) if sparse.is_taken(inner)]
    by_row = {
        str(named.expression)
        for inner in taken
        if isinstance(inner, AtenOp) and inner.name == "aten.linear.default"
        and (named := context.named_weight(_outside(op, inner.tensor("weight")))) is not None
    }  # fmt: skip
    branches = {}
    for name in ("then_branch", "else_branch"):
        branch = b.subgraph()
        # both branches read one copy of the matrices whose rows are taken
        inside = replace(
            context.nested({"tokens": lambda branch=branch: branch.size(rows, 0)}),  # type: ignore[misc]
            builder=branch,
            gathered=context.gathered | by_row,
        )
        block = op.regions[0].block
        inside.values[block.arguments[0]] = rows
        inside.aliases.update(zip(block.arguments[1:], op.weights, strict=True))
        y = _one_token(inside, block, sparse) if name == "then_branch" else emit_block(inside, block)[0]
        branch.output(y, branch.unique("rows"), DType.F32, None)
        branches[name] = branch.to_graph(name)
    return b.op("If", single, then_branch=branches["then_branch"], else_branch=branches["else_branch"])


def _one_token(context: Context, block: Block, sparse: SparseMlp) -> ir.Value:
    b = context.builder
    for op in block:
        if op in sparse.needed:
            context.values.update(zip(op.results, emit_operation(context, op), strict=True))
    chosen = b.reshape(context.value(sparse.choice), (-1,))
    if tensor_of(sparse.choice).dtype is DType.I1:
        chosen = b.reshape(b.op("NonZero", chosen), (-1,))
    # values of the chosen neurons alone [1, n]; what the choice needed is there for all of them
    apart = replace(context, values=dict(context.values))
    leading = _leading_to(sparse.hidden)
    read = {value for op in leading if op not in sparse.needed for value in op.operands} | {sparse.hidden}
    for value in [result for op in block if op in sparse.needed for result in op.results]:
        if value in read and tensor_of(value).shape == tensor_of(sparse.hidden).shape:
            apart.values[value] = b.op("Gather", context.value(value), chosen, axis=1)
    for op in block:
        if op in sparse.needed or op not in leading:
            continue
        if not sparse.is_taken(op):
            apart.values.update(zip(op.results, emit_operation(apart, op), strict=True))
        elif isinstance(op, AtenOp) and op.name == "aten.linear.default":
            matrix = b.op("Gather", context.value(op.tensor("weight")), chosen, axis=0)
            biases = [b.op("Gather", context.value(bias), chosen, axis=0) for bias in op.tensors("bias")]
            apart.values[op.results[0]] = b.op(
                "Gemm", apart.value(op.tensor("input")), matrix, biases[0] if biases else None, transB=1
            )
        else:
            apart.values.update(zip(op.results, emit_operation(apart, op), strict=True))
    named = context.named_weight(sparse.last.tensor("weight"))
    assert named is not None
    columns = b.op("Gather", context.transposed(named.expression, named.name), chosen, axis=0)
    y = b.op("MatMul", apart.value(sparse.hidden), columns)
    for bias in sparse.last.tensors("bias"):
        y = b.op("Add", y, context.value(bias))
    return y


def _by_numbers(masked: AtenOp) -> tuple[Value, float] | None:
    """(numbers of neurons [tokens, k], their share) where those count that `aten.topk` found."""
    mask = masked.tensor("other").defining_op if masked.name == "aten.mul.Tensor" else None
    if not isinstance(mask, AtenOp) or mask.name != "aten.scatter.value":
        return None
    index = mask.tensor("index")
    zeros, best = mask.tensor("self").defining_op, index.defining_op
    plain = zeros is not None and zeros.name == "aten.zeros_like.default" and mask.argument("value") == 1
    if best is None or best.name != "aten.topk.default" or index is not best.results[1] or not plain:
        return None
    sizes = [tensor_of(value).shape[-1] for value in (index, masked.results[0])]
    return (index, sizes[0] / sizes[1]) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[operator]


def _by_threshold(masked: AtenOp) -> tuple[Value, float] | None:
    """(whether each neuron is used, their share if gates were normal) where those count that stand out."""
    if masked.name != "aten.where.ScalarOther" or masked.argument("other") != 0:
        return None
    mask = masked.tensor("condition")
    above = mask.defining_op
    limit = above.tensor("other").defining_op if isinstance(above, AtenOp) and above.name == "aten.gt.Tensor" else None
    if not isinstance(limit, AtenOp) or limit.name != "aten.add.Tensor":
        return None
    return mask, 1 - NormalDist().cdf(float(limit.argument("alpha")))


def _leading_to(value: Value) -> dict[Operation, None]:
    """The operations of the block that a value depends on."""
    found: dict[Operation, None] = {}
    frontier = [value]
    while frontier:
        op = frontier.pop().defining_op
        if op is None or op in found or isinstance(op, WeightOp | ConstantOp):
            continue
        found[op] = None
        frontier += op.operands
    return found


def _outside(op: MLPOp, value: Value) -> Value:
    """The weight of the model that an argument of the body stands for."""
    return op.weights[value.index - 1] if isinstance(value, BlockArgument) and value.index else value
