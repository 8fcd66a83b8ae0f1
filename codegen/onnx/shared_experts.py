"""Shared experts inside the fused operator: experts that every token takes, beside those that it is routed to.

`experts(x) + gate * mlp(x)` is one node when the dense block has the form of the routed experts: it becomes further
experts, with the gate (or 1) as their routing weight. A block n times as wide as an expert becomes n experts, each with
its share of the inner channels; their outputs add up to the block's, so this is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.codegen.onnx.context import Context, tensor_of
from moec.codegen.onnx.expert_form import FusedForm, NotFused, form_of_body
from moec.codegen.onnx.expert_products import Stacks
from moec.dialects.aten import AtenOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import MLPOp
from moec.ir.operation import Operation, Value
from moec.weights.expression import Concat, Permute, Reshape

_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.clone.default")


# gates that may be negative have no logarithm
_NOT_NEGATIVE = ("aten.sigmoid.default", "aten.softmax.int", "aten.relu.default")


@dataclass(frozen=True)
class SharedExpert:
    """A dense block whose output is added to that of routed experts.

    `total` is the addition, `gate` [..., 1] what multiplies the block's output (None: 1); `inside` are the operations
    that have no meaning but as parts of `total`.
    """

    total: AtenOp
    mlp: MLPOp
    gate: Value | None
    inside: frozenset[Operation]


def find_shared(op: ExpertsOp) -> SharedExpert | None:
    """The shared expert of a layer, by its shape in the graph."""
    inside: set[Operation] = {op}
    value: Value = op.y
    while value.has_one_use and value.users[0].name in _VIEWS:
        inside.add(value.users[0])
        value = value.users[0].results[0]
    total = value.users[0] if value.has_one_use else None
    if not isinstance(total, AtenOp) or total.name != "aten.add.Tensor" or total.argument("alpha") != 1:
        return None
    other = next((operand for operand in total.operands if operand is not value), None)
    if other is None or other.type != total.results[0].type:
        return None
    product, views = _below_views(other)
    inside |= views
    gate: Value | None = None
    if isinstance(product, AtenOp) and product.name == "aten.mul.Tensor" and product.results[0].has_one_use:
        sides = [side for side in product.operands if tensor_of(side).shape[-1] == 1]
        outputs = [side for side in product.operands if side not in sides]
        if len(sides) != 1 or len(outputs) != 1:
            return None
        inside.add(product)
        gate = sides[0]
        source = _root(gate).defining_op
        if source is None or source.name not in _NOT_NEGATIVE:
            return None
        product, views = _below_views(outputs[0])
        inside |= views
    if not isinstance(product, MLPOp) or not product.y.has_one_use or _root(product.x) is not _root(op.x):
        return None
    inside.add(product)
    return SharedExpert(total, product, gate, frozenset(inside))


def with_shared(context: Context, form: FusedForm, shared: SharedExpert) -> tuple[FusedForm, int]:
    """The routed experts followed by the shared one's parts, and how many these are.

    Raises NotFused where the block has another activation, or a width that is no multiple of an expert's.
    """
    stacks = []
    for value in shared.mlp.weights:
        named = context.named_weight(value)
        if named is None:
            raise NotFused("a weight of the shared expert is computed at run time")
        shape = tensor_of(value).static_shape
        stacks.append(Stacks(Reshape(named.expression, (1, *shape)), named.name, shape))
    block = form_of_body(context, shared.mlp.regions[0].block, stacks, experts=1)
    same = (block.activation, block.alpha, block.beta, block.limit) == (
        form.activation,
        form.alpha,
        form.beta,
        form.limit,
    )
    if not same or block.first_bias is not None or form.first_bias is not None or block.width % form.width:
        raise NotFused("the shared expert has another form than the routed ones")
    parts = block.width // form.width
    rows = context.weights.shape_dtype(form.first)[0][1]
    hidden = form.hidden
    # rows of gate and up lie in pairs, so consecutive rows belong to consecutive inner channels
    first = Reshape(block.first, (parts, rows, hidden))
    second = Permute(Reshape(block.second, (hidden, parts, form.width)), (1, 0, 2))
    joined = replace(form, first=Concat(0, (form.first, first)), second=Concat(0, (form.second, second)))
    return joined, parts


def _below_views(value: Value) -> tuple[Operation | None, set[Operation]]:
    """What makes a value, views that nothing else reads left out, and those views."""
    views: set[Operation] = set()
    op = value.defining_op
    while op is not None and op.name in _VIEWS and op.results[0].has_one_use:
        views.add(op)
        op = op.operands[0].defining_op
    return op, views


def _root(value: Value) -> Value:
    op = value.defining_op
    while op is not None and op.name in _VIEWS:
        value = op.operands[0]
        op = value.defining_op
    return value
