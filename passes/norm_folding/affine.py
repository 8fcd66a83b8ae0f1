"""Per-channel factors and shifts between two operations, moved into the linear maps around them.

What norms multiply and add, batch norms in evaluation, and products with fixed vectors or numbers are all of the form
y = s * x + t for each channel. `affine_form` reads a value as such a function of a root: the norm itself without its
weights, or whatever the chain begins with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from moec.dialects.aten import AtenOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.ir import Operation, OpResult, Value
from moec.passes.building import permutation
from moec.passes.matching import shape
from moec.passes.norm_folding.fixed import fixed_tensor, is_fixed
from moec.weights.context import WeightContext

BATCH_NORM = "_native_batch_norm_legit_no_training.default"
_LAYOUTS = (
    "view.default", "reshape.default", "_unsafe_view.default", "permute.default", "transpose.int", "slice.Tensor",
    "clone.default", "contiguous.default", "alias.default", "detach.default",
)  # fmt: skip
_PRODUCTS = ("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar")
_SUMS = ("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar")


@dataclass(frozen=True)
class AffineForm:
    """A value as scale * layout(root) + shift.

    `root` is a value, or the result of a norm, which then stands for that norm without weight and bias. `layout` are
    the operations that only move elements, first to last. `scale` and `shift` are float64, [channels] or one number;
    `axis` is that of the channels, None as long as both are numbers. `per_channel`: a norm with weights, a batch norm
    or a product with a vector is among what was read.
    """

    root: Value
    layout: tuple[AtenOp, ...] = ()
    scale: torch.Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    shift: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    axis: int | None = None
    per_channel: bool = False

    @property
    def is_trivial(self) -> bool:
        """Whether the value is the root moved about."""
        return bool((self.scale == 1).all()) and not bool(self.shift.any())

    def same_layout(self, other: AffineForm) -> bool:
        """Whether both have the same root, moved in the same way."""
        moves = [[(op.name, op.attributes) for op in form.layout] for form in (self, other)]
        return self.root is other.root and moves[0] == moves[1]

    def vectors(self, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, shift), each [channels]."""
        return self.scale.expand(channels), self.shift.expand(channels)


class AffineReader:
    """Reads values as affine forms, each once."""

    def __init__(self, weights: WeightContext) -> None:
        self._weights = weights
        self._known: dict[Value, AffineForm] = {}

    def form(self, value: Value) -> AffineForm:
        """The value as a function of what its chain begins with."""
        if value not in self._known:
            self._known[value] = self._read(value)
        return self._known[value]

    def _read(self, value: Value) -> AffineForm:
        op = value.defining_op
        if isinstance(op, RMSNormOp | LayerNormOp):
            return self._norm(op)
        if not isinstance(op, AtenOp) or not isinstance(value, OpResult) or value.index != 0:
            return AffineForm(value)
        name = op.name.removeprefix("aten.")
        found = None
        if name in _LAYOUTS:
            found = self._moved(op)
        elif name == BATCH_NORM:
            found = self._batch_norm(op)
        elif name in _PRODUCTS:
            found = self._product(op)
        elif name in _SUMS:
            found = self._sum(op)
        return found or AffineForm(value)

    def _norm(self, op: RMSNormOp | LayerNormOp) -> AffineForm:
        form = AffineForm(op.y, axis=len(shape(op.y)) - 1)
        bias = op.bias if isinstance(op, LayerNormOp) else None
        offset = op.offset if isinstance(op, RMSNormOp) else 0.0
        if op.weight is not None and is_fixed(op.weight):
            form = replace(form, scale=fixed_tensor(op.weight, self._weights) + offset, per_channel=True)
        if bias is not None and is_fixed(bias):
            form = replace(form, shift=fixed_tensor(bias, self._weights), per_channel=True)
        return form

    def _moved(self, op: AtenOp) -> AffineForm | None:
        inner = self.form(op.operands[0])
        axis = None if inner.axis is None else _moved_axis(op, inner.axis)
        if axis is None and inner.axis is not None:
            return None
        return replace(inner, layout=(*inner.layout, op), axis=axis)

    def _batch_norm(self, op: AtenOp) -> AffineForm | None:
        weights, biases = op.tensors("weight"), op.tensors("bias")
        fixed = [op.tensor("running_mean"), op.tensor("running_var"), *weights, *biases]
        if not all(map(is_fixed, fixed)):
            return None
        mean, variance, *rest = (fixed_tensor(value, self._weights) for value in fixed)
        scale = (variance + op.argument("eps")).rsqrt()
        if weights:
            scale = scale * rest[0]
        shift = -mean * scale
        if biases:
            shift = shift + rest[-1]
        return self._composed(self.form(op.tensor("input")), scale, shift, 1)

    def _product(self, op: AtenOp) -> AffineForm | None:
        divides = op.name.startswith("aten.div")
        if divides and op.attributes.get("rounding_mode") is not None:
            return None
        for moving, factor, axis in self._with_fixed(op, in_any_order=not divides):
            inner = self.form(moving)
            scale = 1 / factor if divides else factor
            return self._composed(inner, scale, torch.zeros_like(scale), axis)
        return None

    def _sum(self, op: AtenOp) -> AffineForm | None:
        alpha = float(op.argument("alpha"))
        sign = -alpha if op.name.startswith("aten.sub") else alpha
        if op.operand_count == 1 or any(is_fixed(value) for value in op.operands):
            # with `self` fixed, alpha belongs to the other one
            for moving, shift, axis in self._with_fixed(op, in_any_order=sign == 1):
                return self._composed(self.form(moving), torch.ones_like(shift), sign * shift, axis)
            return None
        one, two = (self.form(value) for value in op.operands)
        if not one.same_layout(two) or (not one.per_channel and not two.per_channel):
            return None
        axis = two.axis if one.axis is None else one.axis
        if two.axis not in (None, axis):
            return None
        return replace(
            one, scale=one.scale + sign * two.scale, shift=one.shift + sign * two.shift, axis=axis, per_channel=True
        )

    def _with_fixed(self, op: AtenOp, in_any_order: bool) -> Iterator[tuple[Value, torch.Tensor, int | None]]:
        """(value that moves, fixed numbers [channels] or [1], their axis) where the operation has such operands."""
        if op.operand_count == 1:
            yield op.operands[0], torch.tensor([float(op.argument("other"))], dtype=torch.float64), None
            return
        one, other = op.operands
        for moving, fixed in ((one, other), (other, one)) if in_any_order else ((one, other),):
            if is_fixed(moving) or not is_fixed(fixed) or shape(moving) != shape(op.results[0]):
                continue
            sizes = shape(fixed)
            long = [at for at, size in enumerate(sizes) if size != 1]
            if len(long) > 1:
                continue
            axis = len(shape(moving)) - len(sizes) + long[0] if long else None
            yield moving, fixed_tensor(fixed, self._weights).double().flatten(), axis
            return

    def _composed(
        self, inner: AffineForm, scale: torch.Tensor, shift: torch.Tensor, axis: int | None
    ) -> AffineForm | None:
        if axis is not None and inner.axis not in (None, axis):
            return None
        return replace(
            inner,
            scale=inner.scale * scale,
            shift=inner.shift * scale + shift,
            axis=inner.axis if axis is None else axis,
            per_channel=inner.per_channel or axis is not None,
        )


def axis_behind(layout: tuple[AtenOp, ...], axis: int) -> int | None:
    """Where an axis of the first operand lies in the last result, None where it is cut or joined with another."""
    found: int | None = axis
    for op in layout:
        if found is None:
            return None
        found = _moved_axis(op, found)
    return found


def _moved_axis(op: AtenOp, axis: int) -> int | None:
    before, after = shape(op.operands[0]), shape(op.results[0])
    if op.name in ("aten.permute.default", "aten.transpose.int"):
        return permutation(op).index(axis)
    if op.name == "aten.slice.Tensor":
        return None if op.argument("dim") % len(before) == axis else axis
    if before == after:
        return axis
    return len(after) - 1 if axis == len(before) - 1 and before[-1] == after[-1] else None


def has_batch_statistics(op: Operation) -> bool:
    """Whether a batch norm takes mean and variance from the batch that it is given."""
    return op.name.startswith("aten._native_batch_norm_legit.")
