"""Structural equality: the same operations in the same order, whatever the names of values and the locations."""

from __future__ import annotations

from moec.ir.operation import Operation, Value


def structurally_equal(left: Operation, right: Operation) -> bool:
    """Whether `structural_difference` finds nothing."""
    return structural_difference(left, right) is None


def structural_difference(left: Operation, right: Operation) -> str | None:
    """What differs first, in words; None where the two are equal. Values defined outside both must be identical."""
    return _compare(left, right, {})


def _compare(left: Operation, right: Operation, same: dict[Value, Value]) -> str | None:
    if left.name != right.name:
        return f"{left!r} against {right!r}"
    if len(left._operands) != len(right._operands):
        return f"numbers of operands differ: {left!r} against {right!r}"
    for index, (a, b) in enumerate(zip(left._operands, right._operands, strict=True)):
        if same.get(a, a) is not b:
            return f"operand {index} differs: {left!r} against {right!r}"
    if _typed(left.attributes) != _typed(right.attributes):
        return f"attributes differ: {left!r} against {right!r}"
    if [r.type for r in left.results] != [r.type for r in right.results]:
        return f"result types differ: {left!r} against {right!r}"
    if len(left.regions) != len(right.regions):
        return f"numbers of regions differ: {left!r} against {right!r}"
    difference = _compare_regions(left, right, same)
    if difference is not None:
        return difference
    same.update(zip(left.results, right.results, strict=True))
    return None


def regions_equal(left: Operation, right: Operation) -> bool:
    """Whether the regions of two operations are equal; values from outside must be identical."""
    return len(left.regions) == len(right.regions) and _compare_regions(left, right, {}) is None


def _compare_regions(left: Operation, right: Operation, same: dict[Value, Value]) -> str | None:
    for a_region, b_region in zip(left.regions, right.regions, strict=True):
        a_types = [argument.type for argument in a_region.block.arguments]
        b_types = [argument.type for argument in b_region.block.arguments]
        if a_types != b_types:
            return f"block arguments differ: {left!r} against {right!r}"
        same.update(zip(a_region.block.arguments, b_region.block.arguments, strict=True))
        a_ops, b_ops = list(a_region.block), list(b_region.block)
        for a_op, b_op in zip(a_ops, b_ops, strict=False):
            difference = _compare(a_op, b_op, same)
            if difference is not None:
                return difference
        if len(a_ops) != len(b_ops):
            extra = (a_ops if len(a_ops) > len(b_ops) else b_ops)[min(len(a_ops), len(b_ops))]
            return f"only one side has {extra!r}"
    return None


def _typed(value: object) -> object:
    """A form in which 1, 1.0 and True differ, and NaN equals itself."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_typed(item) for item in value)
    return (type(value), repr(value) if isinstance(value, float) else value)
