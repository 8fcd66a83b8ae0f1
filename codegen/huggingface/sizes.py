"""The sizes that the experts of our IR need of a config, and the shapes that the config's model must have for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moec.codegen.huggingface.experts import WIDTH_STEP, LayerPair, Layout, Needs, Part
from moec.codegen.huggingface.fields import Change, Shapes, Values, experts_change, number_fields, width_change
from moec.codegen.huggingface.matching import Match
from moec.codegen.huggingface.template import Template
from moec.errors import UnsupportedModelError
from moec.ir import TensorType
from moec.weights.expression import Expression, Reference, Reshape
from moec.weights.expression_parser import parse_expression

_MOST_WIDTHS = 32
_MOST_FACTOR = 64
_WIDTH_DIM = {Part.GATE: 0, Part.UP: 0, Part.DOWN: 1, Part.GATE_BIAS: 0, Part.UP_BIAS: 0}


@dataclass(frozen=True)
class Sizes:
    """What all layers with experts need together, from the template's numbers to ours."""

    old: Needs
    new: Needs

    def with_width(self, width: int) -> Sizes:
        """The same with another width of experts."""
        return Sizes(self.old, Needs(self.new.outputs, self.new.slots, width))


def common_needs(needs: Sequence[tuple[str, Needs]], *, fillable: bool = False) -> Needs:
    """What one config must offer to all layers; `fillable` says whether --uniform gives them equal numbers of experts.

    Raises UnsupportedModelError where they differ in what has one field.
    """
    outputs = {need.outputs for _, need in needs}
    slots = {need.slots for _, need in needs}
    if len(outputs) > 1:
        counts = ", ".join(f"{need.outputs} in {name}" for name, need in needs)
        raise UnsupportedModelError(
            f"the layers have different numbers of experts ({counts}); a config of transformers has one number for all",
            hint="--uniform fills the smaller layers up with experts that are never chosen"
            if fillable
            else f"keep {max(outputs)} experts in every layer, or {min(outputs)} (prune-experts with scope=layer); "
            "this router has no bias by which --uniform could add experts that are never chosen",
        )
    if len(slots) > 1:
        counts = ", ".join(f"{need.slots} in {name}" for name, need in needs)
        raise UnsupportedModelError(
            f"the layers choose different numbers of experts per token ({counts}); a config of transformers has one "
            "number for all",
            hint=f"choose {max(slots)} experts in every layer",
        )
    return Needs(outputs.pop(), slots.pop(), max(need.width for _, need in needs))


def aligned(width: int, old: int) -> int:
    """The least width from `width` on that transformers runs; `old` is one that it does run."""
    up = -(-width // WIDTH_STEP) * WIDTH_STEP
    return old if width <= old < up else up


def wanted_shapes(
    template: Template, match: Match, layouts: Sequence[tuple[LayerPair, Layout]], sizes: Sizes
) -> Shapes:
    """The shapes of all parameters of a model with our sizes.

    Parameters outside of the experts are as our IR has them, those of the experts as the template's layout grows or
    shrinks.
    """
    shapes = {name: spec.shape for name, spec in template.specs.items()}
    for source, (_, ours) in match.weights.items():
        expression = parse_expression(source)
        if isinstance(expression, Reference) and isinstance(ours.value.type, TensorType):
            shapes[expression.name] = ours.value.type.static_shape
    for pair, layout in layouts:
        for stack in layout.stacks():
            name, shape = _resized(template, stack, layout, len(pair.ours.stored) - len(pair.template.stored), sizes)
            shapes[name] = shape
    return shapes


def _resized(
    template: Template, stack: Expression, layout: Layout, more: int, sizes: Sizes
) -> tuple[str, tuple[int, ...]]:
    old, _ = template.module.weights.shape_dtype(stack)
    new = [old[0] + more, *old[1:]]
    for dim in range(1, len(old)):
        for place in layout.places:
            axis = _WIDTH_DIM.get(place.part)
            if place.stack != stack or axis is None:
                continue
            if len(old) == 3 and place.view.transposed:
                axis = 1 - axis
            if axis + 1 == dim:
                new[dim] = old[dim] // sizes.old.width * sizes.new.width
    if isinstance(stack, Reference):
        return stack.name, tuple(new)
    if isinstance(stack, Reshape) and isinstance(stack.operand, Reference):
        rest = template.specs[stack.operand.name].shape[1:]
        return stack.operand.name, (math.prod(new) // math.prod(rest), *rest)
    raise UnsupportedModelError(f"the experts of this architecture are read through {stack}")


def wider(values: Values, sizes: Sizes) -> list[int]:
    """Widths above ours up to the template's, the smallest first: those whose multiples some field could count."""
    found = {sizes.old.width}
    factors = {field.value for field in number_fields(values) if 0 < field.value <= _MOST_FACTOR}
    for factor in factors:
        for count in range(1, _MOST_FACTOR + 1):
            width, rest = divmod(factor * sizes.old.width, count)
            if not rest and sizes.new.width < width <= sizes.old.width:
                found.add(width)
    usable = {aligned(width, sizes.old.width) for width in found}
    return sorted(width for width in usable if sizes.new.width < width <= sizes.old.width)[:_MOST_WIDTHS]


def shape_changes(sizes: Sizes) -> list[Change]:
    """The changes of the config that shapes show."""
    found = []
    if sizes.old.outputs != sizes.new.outputs:
        found.append(experts_change(sizes.old.outputs, sizes.new.outputs))
    if sizes.old.width != sizes.new.width:
        found.append(width_change(sizes.old.width, sizes.new.width))
    return found
