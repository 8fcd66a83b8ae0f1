"""What is noted while a layer runs: sums over all tokens that are not padding, and the rows of the reservoir."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from moec.calibration.statistics import StatisticsSum
from moec.dialects.aten import AtenOp
from moec.experts.dense import DenseLayer
from moec.experts.heads import AttentionHeads
from moec.experts.layer import MoeLayer
from moec.ir import Operation, Region, TensorType, Value
from moec.reference.frame import Observation, Observer

_Chosen = tuple[torch.Tensor, torch.Tensor, bool]


@dataclass(frozen=True)
class BatchPlace:
    """One batch: its inputs, its padding mask int64 [batch, seq] and as boolean [T] (None without padding).

    `rows` int64: its tokens among T that the reservoir takes, `target` their places in it, `sequence` int64 the
    sequences that they are from.
    """

    inputs: Mapping[str, torch.Tensor]
    mask: torch.Tensor
    kept: torch.Tensor | None
    rows: torch.Tensor
    target: slice
    sequence: torch.Tensor


@dataclass
class LayerRows:
    """The reservoir of one layer: [R, H] each; `router_input` is None where the router reads the experts' input."""

    x: torch.Tensor
    y: torch.Tensor
    router_input: torch.Tensor | None
    sequence: torch.Tensor

    @staticmethod
    def empty(rows: int, size: int, dtype: torch.dtype, router_size: int = 0) -> LayerRows:
        """Zeros for `rows` rows of H = `size`; of the router's input where it has a size of its own."""
        return LayerRows(
            torch.zeros(rows, size, dtype=dtype),
            torch.zeros(rows, size, dtype=dtype),
            torch.zeros(rows, router_size, dtype=dtype) if router_size else None,
            torch.zeros(rows, dtype=torch.int64),
        )

    def note(self, place: BatchPlace, x: torch.Tensor, y: torch.Tensor) -> None:
        """Keeps the rows of one batch, x and y [..., H]."""
        self.x[place.target] = x.reshape(-1, x.shape[-1])[place.rows]
        self.y[place.target] = y.reshape(-1, y.shape[-1])[place.rows]
        self.sequence[place.target] = place.sequence


_Handler = Callable[[Observation, BatchPlace], None]


class DenseGathering:
    """What one dense feed-forward block gives, while batches run: rows alone."""

    def __init__(self, layer: DenseLayer | AttentionHeads, rows: int, dtype: torch.dtype) -> None:
        self.layer = layer
        self._rows, self._dtype = rows, dtype

    @cached_property
    def rows(self) -> LayerRows:
        """The reservoir; there is none before the block runs, since all layers' together are large."""
        layer = self.layer
        if isinstance(layer, AttentionHeads):
            size = _last_size(layer.x)
            return LayerRows.empty(self._rows, size, self._dtype, _last_size(layer.rows))
        return LayerRows.empty(self._rows, layer.hidden_size, self._dtype)

    def release(self) -> None:
        """Lets go of the reservoir, which observers of finished layers would keep."""
        self.__dict__.pop("rows", None)

    def handlers(self) -> dict[Operation, _Handler]:
        """What to call for which operation."""
        if isinstance(self.layer, AttentionHeads):
            return {self.layer.query_map: self._on_queries, self.layer.projection: self._on_heads}
        return {self.layer.op: self._on_block}

    def _on_block(self, seen: Observation, place: BatchPlace) -> None:
        assert isinstance(self.layer, DenseLayer)
        self.rows.note(place, seen.operand(self.layer.op.x), seen.results[0])

    def _on_queries(self, seen: Observation, place: BatchPlace) -> None:
        """What the router of experts made of heads would read."""
        assert isinstance(self.layer, AttentionHeads) and self.rows.router_input is not None
        given = seen.operand(self.layer.rows)
        self.rows.router_input[place.target] = given.reshape(-1, given.shape[-1])[place.rows]

    def _on_heads(self, seen: Observation, place: BatchPlace) -> None:
        """The projection of heads, less what it adds whatever they give."""
        assert isinstance(self.layer, AttentionHeads)
        y, bias = seen.results[0], self.layer.bias
        self.rows.note(place, seen.operand(self.layer.x), y if bias is None else y - seen.operand(bias))


class LayerGathering:
    """What one layer gives, while batches run."""

    def __init__(self, layer: MoeLayer, rows: int, dtype: torch.dtype) -> None:
        self.layer = layer
        size = layer.hidden_size
        self.sums = StatisticsSum(layer.outputs, size, expert_widths(layer))
        self._rows, self._dtype = rows, dtype
        self._chosen: dict[int, _Chosen] = {}
        self._hidden: torch.Tensor | None = None

    @cached_property
    def rows(self) -> LayerRows:
        """The reservoir; there is none before the layer runs, since all layers' together are large."""
        own_input = self.layer.router.tensor("input") is not self.layer.experts.x
        router_size = _last_size(self.layer.router.tensor("input"))
        return LayerRows.empty(self._rows, self.layer.hidden_size, self._dtype, router_size if own_input else 0)

    def release(self) -> None:
        """Lets go of the reservoir, which observers of finished layers would keep."""
        self.__dict__.pop("rows", None)

    def on_router(self, seen: Observation, place: BatchPlace) -> None:
        """The router's linear map."""
        if self.rows.router_input is not None:
            given = seen.operand(self.layer.router.tensor("input"))
            self.rows.router_input[place.target] = given.reshape(-1, given.shape[-1])[place.rows]

    def on_route(self, seen: Observation, place: BatchPlace) -> None:
        """The route; the experts' bodies come later."""
        logits = seen.operand(self.layer.route.logits)
        ids, gates, _ = seen.results
        stored = torch.tensor(self.layer.stored, dtype=torch.int64)[ids]
        stored = torch.where(gates != 0, stored, -1)
        if place.kept is not None:
            logits = logits[place.kept]
        self.sums.add_logits(logits)
        self.sums.add_choices(stored if place.kept is None else stored[place.kept])
        self._chosen = dict(_first_rows(stored, gates, place.kept))

    def on_hidden(self, seen: Observation, place: BatchPlace) -> None:
        """What the last product of a body reads."""
        self._hidden = seen.results[0]

    def on_output(self, seen: Observation, place: BatchPlace) -> None:
        """What a body gives."""
        hidden, self._hidden = self._hidden, None
        assert seen.expert is not None
        # the executor computes an expert for every slot that names it; a token counts once, with the sum of its gates
        rows, gates, whole = self._chosen[seen.expert]
        if not len(rows):
            return
        outputs = seen.results[0]
        if not whole:
            outputs, hidden = outputs[rows], None if hidden is None else hidden[rows]
        self.sums.add_outputs(seen.expert, gates, outputs, hidden)

    def on_experts(self, seen: Observation, place: BatchPlace) -> None:
        """The whole layer."""
        self.rows.note(place, seen.operand(self.layer.experts.x), seen.results[0])


def gather(layers: Sequence[LayerGathering | DenseGathering], place: BatchPlace) -> Observer:
    """An observer of the run of one batch."""
    handlers: dict[Operation, _Handler] = {}
    for found in layers:
        if isinstance(found, DenseGathering):
            handlers.update(found.handlers())
            continue
        layer = found.layer
        handlers[layer.router] = found.on_router
        handlers[layer.route] = found.on_route
        handlers[layer.experts] = found.on_experts
        for region in layer.experts.regions:
            hidden = hidden_value(region)
            if hidden is not None and hidden.defining_op is not None:
                handlers[hidden.defining_op] = found.on_hidden
            output = region.block.terminator.operands[0].defining_op
            assert output is not None
            handlers[output] = found.on_output

    def observe(seen: Observation) -> None:
        handler = handlers.get(seen.op)
        if handler is not None:
            handler(seen, place)

    return observe


def hidden_value(region: Region) -> Value | None:
    """What the last product of a body reads; None for none.

    A factored matrix is several products in a row, a partly factored one reads slices.
    """
    last = next((op for op in reversed(region.block) if op.name == "aten.linear.default"), None)
    while isinstance(last, AtenOp):
        value = last.tensor("self" if last.name == "aten.slice.Tensor" else "input")
        before = value.defining_op
        if before is None:
            return None
        if before.name not in ("aten.linear.default", "aten.slice.Tensor"):
            return value
        last = before
    return None


def expert_widths(layer: MoeLayer) -> list[int]:
    """The hidden activations of each stored expert, 0 for constants and affine maps."""
    widths = [0] * layer.expert_count
    for group, _, region in layer.experts.class_operands():
        hidden = hidden_value(region)
        for expert in group.experts:
            widths[expert] = 0 if hidden is None else _last_size(hidden)
    return widths


def _last_size(value: Value) -> int:
    assert isinstance(value.type, TensorType)
    size = value.type.shape[-1]
    assert isinstance(size, int)
    return size


def _first_rows(stored: torch.Tensor, gates: torch.Tensor, kept: torch.Tensor | None) -> list[tuple[int, _Chosen]]:
    """For each stored expert (rows, gates, whether rows are all) among the rows that the executor computes of it.

    Those rows are the slots that name the expert, in the order of tokens; `rows` are the first of each token.
    """
    tokens, slots = torch.nonzero(stored >= 0, as_tuple=True)
    named, given = stored[tokens, slots], gates[tokens, slots].double()
    order = torch.sort(named, stable=True).indices
    tokens, named, given = tokens[order], named[order], given[order]
    found, counts = torch.unique_consecutive(named, return_counts=True)
    result: list[tuple[int, _Chosen]] = []
    start = 0
    for expert, count in zip(found.tolist(), counts.tolist(), strict=True):
        at, gate = tokens[start : start + count], given[start : start + count]
        start += count
        unique, place = torch.unique_consecutive(at, return_inverse=True)
        whole = len(unique) == count
        rows = torch.arange(count)
        if not whole:
            gate = torch.zeros(len(unique), dtype=gate.dtype).index_add_(0, place, gate)
            rows = torch.cat([rows[:1], rows[1:][place[1:] != place[:-1]]])
        if kept is not None:
            real = kept[unique]
            whole = whole and bool(real.all())
            rows, gate = rows[real], gate[real]
        result.append((expert, (rows, gate, whole)))
    return result
