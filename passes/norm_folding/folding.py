"""Moves what norms multiply and add into the linear maps behind them, or before them where those behind are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import LayerNormOp, MLPOp, RMSNormOp
from moec.experts.parts import erase_unused
from moec.ir import Block, BlockArgument, Operation, OpResult, Value
from moec.passes.matching import shape
from moec.passes.norm_folding.affine import BATCH_NORM, AffineForm, AffineReader, axis_behind
from moec.passes.norm_folding.fixed import is_fixed
from moec.passes.norm_folding.linear_maps import Change, LinearMap, linear_map, rewrite_map
from moec.weights.context import WeightContext


class NotLinearError(Exception):
    """An operation reads or makes a value in another way than by a fixed matrix."""

    def __init__(self, op: Operation, what: str) -> None:
        super().__init__(f"{op.name}{f' at {op.location.name}' if op.location.name else ''} {what}")
        self.op = op


def readers_of(value: Value, user: Operation) -> Iterator[LinearMap]:
    """The linear maps by which one user of a value reads it along its last axis. Raises NotLinearError for others."""
    if isinstance(user, MLPOp | ExpertsOp) and user.x is value:
        for region in user.regions:
            argument = region.block.arguments[0]
            for inner in list(argument.users):
                yield from readers_of(argument, inner)
        return
    found = linear_map(user)
    if found is None or found.input is not value:
        raise NotLinearError(user, "reads what a norm gives, and is not linear")
    yield found


def writers_of(value: Value) -> Iterator[LinearMap]:
    """The linear maps whose results, weighted by gates, are the value. Raises NotLinearError for others."""
    op = value.defining_op
    if op is None:
        raise NotLinearError(_owner(value), "is given the value as an argument, which no linear map makes")
    if isinstance(op, MLPOp | ExpertsOp):
        for region in op.regions:
            inner = region.block.terminator.operands[0]
            if len(inner.uses) != 1:
                raise NotLinearError(op, "uses what it gives for something else, too")
            yield from writers_of(inner)
        return
    found = linear_map(op)
    if found is None:
        raise NotLinearError(op, "makes what a norm reads, and is not linear")
    yield found


def _owner(value: Value) -> Operation:
    assert isinstance(value, BlockArgument) and value.block.parent is not None
    owner = value.block.parent.parent
    assert owner is not None
    return owner


@dataclass
class Group:
    """Values that are affine functions of one root, in order."""

    root: Value
    members: list[Value] = field(default_factory=list)

    def sinks(self) -> Iterator[tuple[Value, Operation]]:
        """(member, operation that reads it and whose result is no member)."""
        inside = set(self.members)
        for value in self.members:
            for user in dict.fromkeys(value.users):
                if not any(result in inside for result in user.results):
                    yield value, user

    @property
    def norm(self) -> RMSNormOp | LayerNormOp | None:
        """The norm that the root is."""
        op = self.root.defining_op
        return op if isinstance(op, RMSNormOp | LayerNormOp) else None

    @property
    def named(self) -> Operation:
        """The operation that people know the group by."""
        norm = self.norm
        if norm is not None:
            return norm
        ops = [value.defining_op for value in self.members if value.defining_op is not None]
        return next((op for op in ops if op.name == f"aten.{BATCH_NORM}"), ops[-1])


@dataclass
class Folded:
    """What became of the groups of a block: how many were folded, and why others were not."""

    forward: int = 0
    backward: int = 0
    refused: list[tuple[Operation, str]] = field(default_factory=list)


def fold_block(block: Block, weights: WeightContext, untie: bool) -> Folded:
    """Folds every group of a function's block. `untie`: also into weights that other operations read, too."""
    result = Folded()
    reader = AffineReader(weights)
    for group in _groups(block, reader):
        problem = _why_not(group, reader)
        if problem is None:
            problem = _fold_forward(group, reader, weights, untie)
            if problem is None:
                result.forward += 1
                continue
            if group.norm is None and _fold_backward(group, reader, weights, untie) is None:
                result.backward += 1
                continue
        result.refused.append((group.named, problem))
    return result


def _groups(block: Block, reader: AffineReader) -> list[Group]:
    found: dict[Value, Group] = {}
    for op in block:
        for value in op.results[:1]:
            form = reader.form(value)
            if form.root is not value or isinstance(op, RMSNormOp | LayerNormOp):
                found.setdefault(form.root, Group(form.root)).members.append(value)
    return [group for group in found.values() if _has_work(group, reader)]


def _has_work(group: Group, reader: AffineReader) -> bool:
    forms = [reader.form(value) for value in group.members]
    if group.norm is not None and group.norm.operand_count > 1:
        return True
    counted = [form for form in forms if form.per_channel or group.norm is not None]
    return any(not form.is_trivial for form in counted)


def _why_not(group: Group, reader: AffineReader) -> str | None:
    norm = group.norm
    if norm is not None and not all(map(is_fixed, norm.operands[1:])):
        return "its weight is computed from the input"
    return None


def _fold_forward(group: Group, reader: AffineReader, weights: WeightContext, untie: bool) -> str | None:
    """Folds into the maps behind; the reason where that is not possible."""
    plans: list[tuple[Value, Operation, list[LinearMap]]] = []
    for value, user in group.sinks():
        form = reader.form(value)
        try:
            maps = [] if form.is_trivial else list(readers_of(value, user))
        except NotLinearError as error:
            return str(error)
        if not form.is_trivial and form.axis is not None and form.axis != len(shape(value)) - 1:
            return f"{user.name} at {user.location.name} reads another axis than that of the channels"
        if not untie and (tied := _tied(maps)) is not None:
            return f"the weight {tied} is read by other operations, too"
        plans.append((value, user, maps))
    root = _bare_root(group)
    for value, user, maps in plans:
        form = reader.form(value)
        moved = _replayed(root, form, user)
        for position, operand in enumerate(user.operands):
            if operand is value:
                user.set_operand(position, moved)
        channels = shape(value)[-1]
        assert isinstance(channels, int)
        for found in maps:
            change = _input_change(*form.vectors(channels))
            rewrite_map(_again(found), change, weights)
    _erase(group)
    return None


def _input_change(scale: torch.Tensor, shift: torch.Tensor) -> Change:
    """W diag(s), b + W t."""

    def bias(matrix: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor | None:
        if not bool(shift.any()):
            return old
        more = matrix @ shift
        return more if old is None else old + more

    return Change(lambda matrix: matrix * scale, bias, by_rows=True)


def _fold_backward(group: Group, reader: AffineReader, weights: WeightContext, untie: bool) -> str | None:
    """Folds into the map that makes the root; the reason where that is not possible."""
    try:
        maps = list(writers_of(group.root))
    except NotLinearError as error:
        return str(error)
    if not untie and (tied := _tied(maps)) is not None:
        return f"the weight {tied} is read by other operations, too"
    inside = set(group.members)
    if any(not any(result in inside for result in user.results) for user in group.root.users):
        return "other operations read what the map gives"
    sinks = list(group.sinks())
    forms = [reader.form(value) for value, _ in sinks]
    last = len(shape(group.root)) - 1
    channels = shape(group.root)[-1]
    if not forms or not isinstance(channels, int):
        return "nothing reads it"
    scale, shift = forms[0].vectors(channels) if forms[0].scale.numel() in (1, channels) else (None, None)
    for form in forms:
        fits = form.axis is None or axis_behind(form.layout, last) == form.axis
        if scale is None or shift is None or not fits or form.scale.numel() not in (1, channels):
            return "its channels are not those of the map"
        others = form.vectors(channels)
        if not torch.equal(scale, others[0]) or not torch.equal(shift, others[1]):
            return "operations behind it read different functions of it"
    assert scale is not None and shift is not None
    moved = [(value, user, _replayed(group.root, reader.form(value), user)) for value, user in sinks]
    for value, user, new in moved:
        for position, operand in enumerate(user.operands):
            if operand is value:
                user.set_operand(position, new)
    _erase(group)
    for found in maps:
        rewrite_map(_again(found), _output_change(scale, shift), weights)
    return None


def _again(found: LinearMap) -> LinearMap:
    """The map as it is now, after others in its body have changed."""
    current = linear_map(found.op)
    assert current is not None
    return current


def _output_change(scale: torch.Tensor, shift: torch.Tensor) -> Change:
    """diag(s) W, s b + t."""

    def bias(matrix: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor | None:
        if old is None:
            return shift if bool(shift.any()) else None
        return old * scale + shift

    return Change(lambda matrix: matrix * scale[:, None], bias, by_rows=False)


def _tied(maps: list[LinearMap]) -> str | None:
    """The name of a weight that something else reads, too."""
    for found in maps:
        users = dict.fromkeys(found.weight.weight.value.users)
        if len(users) > 1:
            return found.weight.weight.weight_name
    return None


def _bare_root(group: Group) -> Value:
    """The root without weights."""
    norm = group.norm
    if norm is None:
        return group.root
    kind = type(norm)
    bare = kind(norm.x, None, epsilon=norm.epsilon, location=norm.location)
    bare.insert_before(norm)
    return bare.results[0]


def _replayed(root: Value, form: AffineForm, user: Operation) -> Value:
    """The moves of a form on another root."""
    value = root
    for op in form.layout:
        copy = op.clone({op.operands[0]: value})
        copy.insert_before(user)
        value = copy.results[0]
    return value


def _erase(group: Group) -> None:
    for value in reversed(group.members):
        assert isinstance(value, OpResult)
        if value.owner.parent is not None:
            erase_unused(value.owner)
