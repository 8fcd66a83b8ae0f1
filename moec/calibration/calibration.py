"""The calibration of a module: what passes ask, recalled from the store where it was gathered before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.calibration.all_experts import mean_outputs, redirect_distortion
from moec.calibration.data import CalibrationData
from moec.calibration.observation import expert_widths
from moec.calibration.sample import LayerSample, spread_rows
from moec.calibration.statistics import LayerStatistics, StatisticsSum
from moec.calibration.walk import AnyLayer, LayerResult, WalkSettings, walk
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import ExpertsOp
from moec.errors import UsageError
from moec.experts.dense import find_dense_layers
from moec.experts.expert import FeedForward
from moec.experts.heads import readable_heads
from moec.experts.layer import MoeLayer, find_moe_layers
from moec.experts.reading import load_expert
from moec.ir import Operation, Value, print_operation
from moec.ir.printer import attribute_text
from moec.weights.expression import Stored
from moec.weights.store import Work

if TYPE_CHECKING:
    from moec.module import Module
    from moec.weights.context import WeightContext

_CODE_VERSION = "2"

Kept = torch.Tensor | Stored
"""A tensor in memory, or in the store."""


@dataclass(frozen=True)
class _LayerRecord:
    """What is kept of one layer, and the fingerprint of the layer that it was gathered from."""

    fingerprint: str
    tensors: Mapping[str, Kept]


class Calibration:
    """What a module did on a text. `tokens` were seen; `data` says which; `from_cache` whether it was gathered before.

    Layers are found by their names, so that they may change after the calibration.
    """

    def __init__(
        self,
        data: CalibrationData,
        weights: WeightContext,
        records: Mapping[str, _LayerRecord],
        *,
        from_cache: bool,
    ) -> None:
        self.data = data
        self.from_cache = from_cache
        self._weights = weights
        self._records = records
        self._recomputed: dict[str, tuple[str, LayerStatistics]] = {}
        self._tables: dict[tuple[str, str], tuple[str, torch.Tensor]] = {}

    @property
    def tokens(self) -> int:
        """Tokens that were seen, padding left out."""
        return self.data.tokens

    def statistics(self, layer: MoeLayer) -> LayerStatistics:
        """The sums of a layer: over all tokens where it is as it was calibrated, else of the layer as it is now, over
        the rows of its sample (`tokens` says how many).

        Raises UsageError for a layer that was not calibrated.
        """
        record, fingerprint = self._record(layer), layer_fingerprint(layer)
        if record.fingerprint == fingerprint:
            return LayerStatistics.unpack(self._load(record.tensors["statistics"]))
        if "statistics" not in record.tensors:
            return sample_statistics(layer, self.sample(layer))
        known = self._recomputed.get(layer.name)
        if known is None or known[0] != fingerprint:
            calibrated = LayerStatistics.unpack(self._load(record.tensors["statistics"]))
            found = sample_statistics(layer, self.sample(layer), calibrated.layer_gradient_energy)
            known = self._recomputed[layer.name] = (fingerprint, found)
        return known[1]

    def sample(self, layer: AnyLayer) -> LayerSample:
        """Rows of the original model at this layer; raises UsageError for a layer that was not calibrated."""
        tensors = self._record(layer).tensors
        x = self._load(tensors["x"])
        router_input = self._load(tensors["router_input"]) if "router_input" in tensors else x
        gradient = self._load(tensors["gradient"]) if "gradient" in tensors else None
        y, sequence = self._load(tensors["y"]), self._load(tensors["sequence"])
        return LayerSample(x, router_input, y, gradient, sequence, self._weights)

    def knows(self, layer: AnyLayer) -> bool:
        """Whether a layer was calibrated."""
        return layer.name in self._records

    def domains(self, sample: LayerSample) -> torch.Tensor:
        """The number of the text, among `data.domains`, that each row of a sample is from: int64 [R]."""
        return torch.tensor(self.data.domain, dtype=torch.int64)[sample.sequence]

    def with_outputs(self, outputs: Mapping[str, torch.Tensor]) -> Calibration:
        """The same with other outputs y [R, H] in the samples of some layers, by name.

        For whoever moves a part of a layer's output to another place, where all that follows is to know the rest.
        """
        records = dict(self._records)
        for name, y in outputs.items():
            record = records[name]
            kept: Kept = y if self._weights.store is None else self._weights.store.put(y)
            records[name] = _LayerRecord(record.fingerprint, {**record.tensors, "y": kept})
        return Calibration(self.data, self._weights, records, from_cache=self.from_cache)

    def with_router_inputs(self, inputs: Mapping[str, torch.Tensor]) -> Calibration:
        """The same with other rows [R, F] in front of the routers of some layers, by name.

        For whoever lets a router read something else, where what follows is to route the sample as the model does.
        """
        records = dict(self._records)
        for name, rows in inputs.items():
            record = records[name]
            kept: Kept = rows if self._weights.store is None else self._weights.store.put(rows)
            records[name] = _LayerRecord(record.fingerprint, {**record.tensors, "router_input": kept})
        return Calibration(self.data, self._weights, records, from_cache=self.from_cache)

    def token_ids(self, sample: LayerSample) -> torch.Tensor:
        """The token that each row of a sample of all rows is: int64 [R]."""
        stream = torch.cat([torch.from_numpy(sequence) for sequence in self.data.sequences])
        return stream[spread_rows(len(stream), len(sample))]

    @property
    def has_gradients(self) -> bool:
        """Whether samples have gradients."""
        return all("gradient" in record.tensors for record in self._records.values())

    def mean_outputs(self, layer: MoeLayer) -> torch.Tensor:
        """`all_experts.mean_outputs` of the layer's sample, computed once."""
        return self._table("mean_outputs", layer)

    def redirect_distortion(self, layer: MoeLayer) -> torch.Tensor:
        """`all_experts.redirect_distortion` of the layer's sample, computed once."""
        return self._table("redirect_distortion", layer)

    def _table(self, name: str, layer: MoeLayer) -> torch.Tensor:
        record, fingerprint = self._record(layer), layer_fingerprint(layer)
        if record.fingerprint == fingerprint and name in record.tensors:
            return self._load(record.tensors[name])
        known = self._tables.get((name, layer.name))
        if known is None or known[0] != fingerprint:
            known = self._tables[name, layer.name] = (fingerprint, _TABLES[name](layer, self.sample(layer)))
        return known[1]

    def _record(self, layer: AnyLayer) -> _LayerRecord:
        record = self._records.get(layer.name)
        if record is None:
            raise UsageError(
                "this layer was not calibrated", where=layer.name, hint="run calibrate on the module as it is now"
            )
        return record

    def _load(self, kept: Kept) -> torch.Tensor:
        return self._weights.load(kept) if isinstance(kept, Stored) else kept


_TABLES = {"mean_outputs": mean_outputs, "redirect_distortion": redirect_distortion}


def calibrate_module(
    module: Module, data: CalibrationData, settings: WalkSettings, *, all_experts: bool = False, heads: bool = False
) -> Calibration:
    """Gathers the statistics of all layers with experts and the rows of dense blocks that are not beside experts, with
    `heads` those of attention, too, or recalls them where the same model saw the same tokens.

    Equal means: equal IR, equal contents of all weights, equal token ids, equal settings. With `all_experts` the tables
    that need every expert on every row are made now, too. Raises as `walk` does.
    """
    blocks = [block for block in find_dense_layers(module.op) if not block.is_beside_experts]
    layers: list[AnyLayer] = [*find_moe_layers(module.op), *blocks]
    if heads:
        layers += readable_heads(module.op)
    fingerprints = {
        layer.name: layer_fingerprint(layer) if isinstance(layer, MoeLayer) else "no experts" for layer in layers
    }
    store = module.weights.store
    work = None
    if store is not None:
        options = f"{settings} all_experts={all_experts}" + (" heads" if heads else "")
        work = Work((module_digest(module), data.digest), "calibrate", options, _CODE_VERSION, 0)
        known = store.recall(work)
        if known is not None:
            return Calibration(data, module.weights, _records(known, fingerprints), from_cache=True)
    kept: dict[str, Kept] = {}

    def keep(found: LayerResult) -> None:
        tensors = {"x": found.rows.x, "y": found.rows.y}
        if found.statistics is not None:
            tensors["statistics"] = found.statistics.pack()
        tensors["sequence"] = found.rows.sequence
        if found.rows.router_input is not None:
            tensors["router_input"] = found.rows.router_input
        if found.gradient is not None:
            tensors["gradient"] = found.gradient
        if all_experts and isinstance(found.layer, MoeLayer):
            router_input = tensors.get("router_input", found.rows.x)
            sample = LayerSample(found.rows.x, router_input, found.rows.y, None, found.rows.sequence, module.weights)
            tensors.update({name: table(found.layer, sample) for name, table in _TABLES.items()})
        for name, tensor in tensors.items():
            kept[f"{found.layer.name}/{name}"] = tensor if store is None else store.put(tensor)

    walk(module, layers, data, settings, keep)
    if store is not None and work is not None:
        store.remember(work, {name: item for name, item in kept.items() if isinstance(item, Stored)})
    return Calibration(data, module.weights, _records(kept, fingerprints), from_cache=False)


def _records(kept: Mapping[str, Kept], fingerprints: Mapping[str, str]) -> dict[str, _LayerRecord]:
    by_layer: dict[str, dict[str, Kept]] = {name: {} for name in fingerprints}
    for name, item in kept.items():
        layer, _, field = name.rpartition("/")
        by_layer[layer][field] = item
    return {name: _LayerRecord(fingerprints[name], tensors) for name, tensors in by_layer.items()}


def sample_statistics(
    layer: MoeLayer, sample: LayerSample, layer_gradient_energy: float | None = None
) -> LayerStatistics:
    """The sums of a layer as it is now over the rows of a sample; raises UnreadableExpertError as `load_expert`."""
    run = sample.route(layer)
    sums = StatisticsSum(layer.outputs, layer.hidden_size, expert_widths(layer))
    sums.add_logits(run.logits)
    sums.add_choices(run.stored_ids)
    for number in range(layer.expert_count):
        rows, gates = sample.chosen(layer, number)
        if not len(rows):
            continue
        expert = load_expert(layer, sample.weights, number)
        x = sample.x[rows].float()
        if isinstance(expert, FeedForward):
            hidden = expert.hidden_activations(x)
            sums.add_outputs(number, gates, expert.down.apply(hidden), hidden)
        else:
            sums.add_outputs(number, gates, expert.apply(x), None)
    return sums.result(layer_gradient_energy)


def layer_fingerprint(layer: MoeLayer) -> str:
    """A digest of everything that decides what a layer computes: its operations and the sources of its weights.

    Protecting experts does not change it.
    """
    known: dict[Value, str] = {layer.router.tensor("input"): "router input", layer.experts.x: "experts' input"}

    def describe(value: Value) -> str:
        if value not in known:
            op = value.defining_op
            known[value] = op.source if isinstance(op, WeightOp) else _operation_text(op, describe)
        return known[value]

    return hashlib.sha256(describe(layer.experts.y).encode()).hexdigest()


def _operation_text(op: Operation | None, describe: Callable[[Value], str]) -> str:
    if op is None:
        return "an argument"
    text = print_operation(op)
    if isinstance(op, ExpertsOp):
        text = text.replace(f"protected = {attribute_text(op.protected)}, ", "", 1)
    return hashlib.sha256("\n".join([text, *map(describe, op.operands)]).encode()).hexdigest()


def module_digest(module: Module) -> str:
    """A digest of a module's IR, names of layers included, and of the contents of all its weights."""
    result = hashlib.sha256(print_operation(module.op, locations=True).encode())
    sources = {op.source: None for op in module.op.walk() if isinstance(op, WeightOp)}
    for source in sources:
        result.update(module.weights.digest(source).encode())
    return result.hexdigest()


def starved_experts(statistics: LayerStatistics, minimum: int) -> Sequence[int]:
    """Stored experts that fewer than `minimum` tokens chose."""
    return [expert for expert, count in enumerate(statistics.count.tolist()) if count < minimum]
