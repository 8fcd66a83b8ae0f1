"""The experts of one layer, written as the template's model stores them.

The template's body reads an expert's matrices as parts of rows of its parameters. Our matrices are written into the
same parts, whatever their own layout is: of another width padded with zero neurons, factored ones multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch

from moec.codegen.huggingface.routing import factor_between
from moec.codegen.huggingface.values import Producer, Rows, Taken, rearranged
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp
from moec.errors import MoecError, UnsupportedModelError
from moec.experts import Constant, Dense, Expert, FeedForward, MoeLayer, Projection, load_expert
from moec.experts.expert import Activation, View
from moec.ir import TensorType
from moec.ir.equality import regions_equal
from moec.weights.context import WeightContext
from moec.weights.expression import Expression
from moec.weights.expression_parser import parse_expression
from moec.weights.tensor_spec import TensorSpec

WIDTH_STEP = 8
"""torch's grouped matrix product, by which transformers runs experts, wants rows of multiples of 16 bytes: 8 elements
of 16 bits."""


class Part(Enum):
    """The tensors of a feed-forward expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_BIAS = "gate bias"
    UP_BIAS = "up bias"
    DOWN_BIAS = "down bias"


@dataclass(frozen=True)
class Needs:
    """What a layer needs of the config: router outputs, experts per token, and the widest expert (0: not known)."""

    outputs: int
    slots: int
    width: int


@dataclass(frozen=True)
class LayerPair:
    """A layer of the template and ours. The two `MoeLayer`s are None where passes cannot take a layer apart."""

    template: ExpertsOp
    ours: ExpertsOp
    template_layer: MoeLayer | None
    layer: MoeLayer | None

    @property
    def name(self) -> str:
        """The place of the layer in the model."""
        return self.ours.location.name or self.template.location.name or "experts"

    @property
    def factor(self) -> float:
        """What our experts give is multiplied with that the config's model does not multiply it with."""
        return factor_between(self.template, self.ours)

    @property
    def is_unchanged(self) -> bool:
        """Whether both have the same experts in the same layout, so that whole stacks are paired."""
        one, two = self.template, self.ours
        return (
            self.factor == 1.0
            and one.stored == two.stored
            and one.classes == two.classes
            and [value.type for value in one.weights] == [value.type for value in two.weights]
            and regions_equal(one, two)
        )


def needs_of(op: ExpertsOp, layer: MoeLayer | None, weights: WeightContext) -> Needs:
    """What one layer needs, ours or the template's."""
    slots = op.ids.type.shape[1] if isinstance(op.ids.type, TensorType) else 0
    width = 0
    if layer is not None:
        for group in op.classes:
            expert = _load(layer, weights, group.experts[0])
            width = max(width, expert.width if isinstance(expert, FeedForward) else 0)
    return Needs(len(op.stored), slots if isinstance(slots, int) else 0, width)


@dataclass(frozen=True)
class Place:
    """Where a tensor of an expert lies: in the rows of the stack `stack`, seen through `view`."""

    part: Part
    stack: Expression
    view: View


@dataclass(frozen=True)
class Layout:
    """How the template stores one expert: activation, width and the place of every tensor."""

    activation: Activation
    width: int
    places: tuple[Place, ...]

    def stacks(self) -> tuple[Expression, ...]:
        """The stacks that the places are in, each once."""
        return tuple(dict.fromkeys(place.stack for place in self.places))


def read_layout(pair: LayerPair, weights: WeightContext) -> Layout:
    """The layout of the template's experts. Raises UnsupportedModelError where they cannot be taken apart."""
    if pair.template_layer is None or len(pair.template.classes) != 1:
        raise UnsupportedModelError("the experts of this architecture cannot be written one by one", where=pair.name)
    expert = load_expert(pair.template_layer, weights, 0)
    if not isinstance(expert, FeedForward):
        raise UnsupportedModelError("an expert of this architecture is no feed-forward block", where=pair.name)
    places = []
    for part, tensor in tensors_of(expert).items():
        loaded = next((item for item in expert.loaded if item.holds(tensor)), None)
        if loaded is None or loaded.row is None:
            raise UnsupportedModelError(f"the {part.value} of its experts is no part of a parameter", where=pair.name)
        places.append(Place(part, loaded.stack, loaded.view))
    layout = Layout(expert.activation, expert.width, tuple(places))
    for stack in layout.stacks():
        _check_cover(layout, stack, weights, pair.name)
    return layout


def _check_cover(layout: Layout, stack: Expression, weights: WeightContext, where: str) -> None:
    shape, _ = weights.shape_dtype(stack)
    times = torch.zeros(shape[1:], dtype=torch.int8)
    for place in layout.places:
        if place.stack == stack:
            _seen(times, place.view).add_(1)
    if not bool((times == 1).all()):
        raise UnsupportedModelError(f"the experts of this architecture leave parts of {stack} unread", where=where)


def tensors_of(expert: Expert) -> dict[Part, torch.Tensor]:
    """The tensors of an expert, factored matrices multiplied out; a constant is the bias of a product with zeros."""
    if isinstance(expert, Constant):
        return {Part.DOWN_BIAS: expert.value}
    assert isinstance(expert, FeedForward)
    found: dict[Part, torch.Tensor] = {}
    for projection, matrix, bias in (
        (expert.gate, Part.GATE, Part.GATE_BIAS),
        (expert.up, Part.UP, Part.UP_BIAS),
        (expert.down, Part.DOWN, Part.DOWN_BIAS),
    ):
        if projection is not None:
            found[matrix] = projection.dense()
            if projection.bias is not None:
                found[bias] = projection.bias
    return found


@dataclass(frozen=True)
class Change:
    """Something that transformers can hold only in a larger form, with the same function.

    `instead` says what would have been as large as it is; empty where nothing is known.
    """

    place: str
    text: str
    instead: str = ""


def find_changes(pair: LayerPair, layout: Layout, weights: WeightContext) -> Iterator[Change]:
    """What has to be written larger than it is. Raises UnsupportedModelError for what cannot be written at all."""
    layer = pair.layer
    if layer is None:
        raise UnsupportedModelError("the experts of this layer cannot be taken apart", where=pair.name)
    if len(pair.template.stored) != len(pair.ours.stored):
        raise UnsupportedModelError(
            f"its router has {len(pair.ours.stored)} outputs, the config's model {len(pair.template.stored)}",
            where=pair.name,
        )
    named = [expert for expert in pair.ours.stored if expert >= 0]
    aliases = len(named) - len(set(named))
    if aliases:
        text = f"{aliases} experts are other names of stored ones, written as copies"
        yield Change(pair.name, text, "merge-experts with router=keep-row")
    nulls = len(pair.ours.stored) - len(named) - sum(expert < 0 for expert in pair.template.stored)
    if nulls:
        text = f"{nulls} experts that compute nothing, written as zeros"
        yield Change(pair.name, text, "prune-experts with on-drop=reselect and scope=layer")
    narrow: dict[int, int] = {}
    for group in pair.ours.classes:
        expert = _load(layer, weights, group.experts[0])
        count = len(group.experts)
        _check_writable(expert, layout, pair.name)
        if isinstance(expert, Constant):
            yield Change(pair.name, f"{count} experts that are constants, written as the bias of zero matrices")
            continue
        assert isinstance(expert, FeedForward)
        if not all(isinstance(item.matrix, Dense) for item in _projections(expert)):
            yield Change(pair.name, f"{count} experts with factored matrices, multiplied out")
        if expert.width < layout.width:
            narrow[expert.width] = narrow.get(expert.width, 0) + count
    if narrow:
        widths = f"width {min(narrow)}" if len(narrow) == 1 else f"widths from {min(narrow)} to {max(narrow)}"
        text = f"{sum(narrow.values())} experts of {widths}, padded with zero neurons to {layout.width}"
        if layout.width - max(narrow) < WIDTH_STEP:
            text += f" (transformers' grouped product takes multiples of {WIDTH_STEP})"
        yield Change(pair.name, text, f"prune-micro-experts with scope=expert round-to={WIDTH_STEP}")


def _check_writable(expert: Expert, layout: Layout, where: str) -> None:
    parts = {place.part for place in layout.places}
    if not isinstance(expert, FeedForward | Constant):
        raise UnsupportedModelError(
            "an expert is one linear map, which transformers has no block for",
            where=where,
            hint="emit ONNX, which takes any IR",
        )
    if isinstance(expert, FeedForward):
        if not _same_activation(expert.activation, layout.activation):
            raise UnsupportedModelError("its experts have another activation than the config's model", where=where)
        if expert.width > layout.width:
            raise UnsupportedModelError(
                f"an expert is {expert.width} wide, those of the config's model {layout.width}", where=where
            )
    present = {Part.DOWN_BIAS} if isinstance(expert, Constant) else set(tensors_of(expert))
    extra = present - parts
    if extra:
        what = "constants" if isinstance(expert, Constant) else f"a {min(part.value for part in extra)}"
        hint = "let dropped experts give nothing or lead to others (on-drop=zero or redirect) and use --uniform"
        raise UnsupportedModelError(
            f"its experts have {what}, for which the experts of this architecture have no parameter",
            where=where,
            hint=hint if isinstance(expert, Constant) else "emit ONNX, which takes any IR",
        )


def _same_activation(one: Activation, two: Activation) -> bool:
    """Whether two activations are spelled alike, or at least agree on numbers of all sizes."""
    if one == two:
        return True
    if one.gated != two.gated:
        return False
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 3, 64, dtype=torch.float64)[:, None]
    gate, up = (torch.randn(64, 16, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    results = [item.compute(gate if item.gated else None, up) for item in (one, two)]
    return torch.allclose(results[0], results[1], rtol=1e-12, atol=1e-12)


def produce(
    pair: LayerPair, layout: Layout | None, template: WeightContext, weights: WeightContext
) -> Iterator[tuple[str, Producer]]:
    """The parameters of the template's layer with their numbers; `layout` is None for an unchanged layer."""

    def spec_of(expression: Expression) -> TensorSpec:
        return TensorSpec(*template.shape_dtype(expression))

    if layout is None:
        for expected, found in zip(pair.template.weights, pair.ours.weights, strict=True):
            one, two = expected.defining_op, found.defining_op
            if not isinstance(one, WeightOp) or not isinstance(two, WeightOp):
                raise UnsupportedModelError("a stack of expert weights is computed", where=pair.name)
            yield rearranged(parse_expression(one.source), spec_of, Taken(parse_expression(two.source), weights))
        return
    writer = _Writer(pair, layout, weights)
    for stack in layout.stacks():
        shape = spec_of(stack).shape
        yield rearranged(stack, spec_of, Rows(partial(writer.row, stack, shape[1:]), shape))


class _Writer:
    """Writes rows of the template's stacks; keeps the tensors of the last expert, since its rows come one by one."""

    def __init__(self, pair: LayerPair, layout: Layout, weights: WeightContext) -> None:
        assert pair.layer is not None
        self._layer, self._layout, self._weights = pair.layer, layout, weights
        self._stored = _stored_by_row(pair)
        self._factor = pair.factor
        self._last: tuple[int, dict[Part, torch.Tensor]] = (-1, {})

    def row(self, stack: Expression, shape: Sequence[int], index: int) -> torch.Tensor:
        result = torch.zeros(tuple(shape))
        tensors = self._tensors(self._stored[index])
        for place in self._layout.places:
            if place.stack == stack and place.part in tensors:
                value = tensors[place.part]
                target = _seen(result, place.view)
                target[tuple(slice(size) for size in value.shape)] = value
        return result

    def _tensors(self, expert: int) -> dict[Part, torch.Tensor]:
        if expert < 0:
            return {}
        if self._last[0] != expert:
            tensors = tensors_of(load_expert(self._layer, self._weights, expert))
            for part in (Part.DOWN, Part.DOWN_BIAS):
                if self._factor != 1.0 and part in tensors:
                    tensors[part] = tensors[part] * self._factor
            self._last = (expert, tensors)
        return self._last[1]


def _stored_by_row(pair: LayerPair) -> list[int]:
    """For each row of the template's stacks our stored expert, -1 for none."""
    (group,) = pair.template.classes
    found = [-1] * len(group.experts)
    for expected, ours in zip(pair.template.stored, pair.ours.stored, strict=True):
        if expected >= 0:
            found[group.experts.index(expected)] = ours
        elif ours >= 0:
            raise UnsupportedModelError("an output without expert would get one", where=pair.name)
    return found


def _seen(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """The part of `tensor` that a view names, as a view of it."""
    part = tensor[tuple(slice(*cut) for cut in zip(view.starts, view.stops, view.steps, strict=True))]
    return part.T if view.transposed else part


def _projections(expert: FeedForward) -> list[Projection]:
    return [item for item in (expert.gate, expert.up, expert.down) if item is not None]


def _load(layer: MoeLayer, weights: WeightContext, expert: int) -> Expert:
    try:
        return load_expert(layer, weights, expert)
    except MoecError as error:
        raise UnsupportedModelError(error.message, where=error.where or layer.name, hint=error.hint) from error
