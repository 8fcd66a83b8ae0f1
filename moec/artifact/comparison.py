"""An artifact against its source, layer by layer: which experts routers choose, how far experts are off, stored bits.

The IR of the artifact stands for its graph, which `moec verify` compares with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from moec.artifact.ledger import round_error
from moec.artifact.loss import LossSettings
from moec.artifact.measurements import Comparison, ExpertErrorRow, RouterRow, StoredBits
from moec.artifact.summary import layer_of_experts, model_size
from moec.artifact.text import TokenizedText
from moec.artifact.tokens import TokenBatch, function_inputs
from moec.dialects.moe import ExpertsOp, ReplicaOp
from moec.errors import UsageError
from moec.ir import Operation, Value
from moec.reference.executor import Executor
from moec.reference.frame import Frame, Observation, Observer
from moec.reference.kernels import prepare
from moec.weights.uses import weight_uses

if TYPE_CHECKING:
    from moec.module import Module

_TOKENS = 2048
"""Tokens that are compared at most: both models run on them without their ONNX form."""


def compare_with_source(
    source: Module, artifact: Module, onnx_file: Path, text: TokenizedText, settings: LossSettings
) -> Comparison:
    """Runs both on the first windows of a text. Raises UsageError for a text shorter than a window, and as the
    executor does for weights that cannot be loaded."""
    limit = min(settings.limit or _TOKENS, _TOKENS)
    count = min((len(text.ids) - 1) // settings.window, max(limit // settings.window, 1))
    if count < 1:
        raise UsageError(f"the text has fewer tokens than one window of {settings.window}", where=text.name)
    windows = text.ids[: count * settings.window].reshape(count, settings.window)
    return Comparison(
        text=text.name,
        tokens=int(windows.size),
        routers=compare_layers(source, artifact, windows, settings.batch),
        stored=stored_bits(source, artifact, onnx_file),
    )


def compare_layers(source: Module, artifact: Module, windows: NDArray[np.int64], batch: int) -> tuple[RouterRow, ...]:
    """Runs both on token ids [windows, tokens], `batch` windows at once, and compares the layers that both have."""
    layers = _paired(source, artifact)
    taps = _Taps(layers)
    for start in range(0, len(windows), batch):
        ids = np.ascontiguousarray(windows[start : start + batch])
        _run(source, ids, taps.of_source)
        _run(artifact, ids, taps.of_artifact)
        taps.compare()
    return tuple(layer.row() for layer in layers)


def stored_bits(source: Module, artifact: Module, onnx_file: Path) -> StoredBits:
    """Counts the files of an exported model."""
    tensors = list(_stored_tensors(onnx_file))
    names = tuple(f"{op.location.name}." for op in artifact.op.walk() if isinstance(op, ExpertsOp) and op.location.name)
    experts = sum(tensor.bytes for tensor in tensors if tensor.name.startswith(names))
    files = sorted({tensor.file for tensor in tensors if tensor.file})
    data = sum((onnx_file.parent / name).stat().st_size for name in files)
    total = data + onnx_file.stat().st_size
    weights, expert_weights = model_size(source).parameters, _expert_weights(source)
    return StoredBits(
        weights=weights,
        bytes=total,
        bits_per_weight=round_error(8 * total / max(weights, 1)),
        expert_weights=expert_weights,
        expert_bytes=experts,
        expert_bits_per_weight=round_error(8 * experts / expert_weights) if expert_weights else None,
        padding_bytes=data - sum(tensor.bytes for tensor in tensors if tensor.file),
    )


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of an exported model: its bytes, and the file beside the model that they lie in, if any."""

    name: str
    bytes: int
    file: str


def _stored_tensors(onnx_file: Path) -> Iterator[_StoredTensor]:
    """Tensors of the main graph; those that share bytes count once."""
    model = onnx.load(onnx_file, load_external_data=False)
    seen = set()
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in entries:
            yield _StoredTensor(tensor.name, len(tensor.raw_data), "")
            continue
        place = (entries["location"], int(entries.get("offset", 0)), int(entries["length"]))
        if place not in seen:
            seen.add(place)
            yield _StoredTensor(tensor.name, place[2], place[0])


def _expert_weights(module: Module) -> int:
    """Elements of all weights of experts, each counted once."""
    read = {weight.defining_op for op in module.op.walk() if isinstance(op, ExpertsOp) for weight in op.weights}
    return sum(use.elements for use in weight_uses(module) if use.op in read)


@dataclass(frozen=True)
class _Seen:
    """What one run of a layer had: x [T, H], ids [T, K] of router outputs, gates [T, K]."""

    frame: Frame
    x: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor

    def chosen(self, outputs: int) -> torch.Tensor:
        """Boolean [T, outputs]."""
        used = torch.where(self.gates != 0, self.ids, outputs)
        wide = torch.zeros(len(used), outputs + 1, dtype=torch.bool)
        return wide.scatter_(1, used, True)[:, :outputs]


@dataclass
class _LayerPair:
    """A layer of the source and what it became; sums over tokens."""

    name: str
    before: ExpertsOp
    after: ExpertsOp
    outputs: int
    tokens: int = 0
    shared: float = 0.0
    same: int = 0
    sums: dict[tuple[int, bool], tuple[int, float, float]] = field(default_factory=dict)

    @property
    def is_comparable(self) -> bool:
        """Whether both have the same router outputs, replicas apart."""
        choice = self.after.ids.defining_op
        own = choice.outputs if isinstance(choice, ReplicaOp) else len(self.after.stored)
        return bool(own == self.outputs)

    @property
    def has_replicas(self) -> bool:
        """Whether each router output has a second replica."""
        return isinstance(self.after.ids.defining_op, ReplicaOp)

    def compare(self, before: _Seen, after: _Seen) -> None:
        """Takes the tokens of two runs into account."""
        old, new = before.chosen(self.outputs), after.chosen(self.outputs)
        self.tokens += len(old)
        self.shared += float(((old & new).sum(1) / old.sum(1).clamp_min(1)).sum())
        self.same += int((old == new).all(1).sum())
        for output in range(self.outputs):
            x = before.x[old[:, output]]
            if not len(x):
                continue
            wanted = _expert_output(self.before, before.frame, x, output).double()
            for low in (False, True) if self.has_replicas else (False,):
                found = _expert_output(self.after, after.frame, x, output + low * self.outputs).double()
                count, wrong, energy = self.sums.get((output, low), (0, 0.0, 0.0))
                wrong += float((found - wanted).square().sum())
                self.sums[output, low] = (count + len(x), wrong, energy + float(wanted.square().sum()))

    def row(self) -> RouterRow:
        """The sums as shares."""
        if not self.is_comparable:
            note = f"the router has {len(self.after.stored)} outputs, that of the source {self.outputs}"
            return RouterRow(layer=self.name, tokens=0, agreement=None, same=None, note=note)
        experts = [
            ExpertErrorRow(
                output=output,
                tokens=self.sums.get((output, False), (0,))[0],
                relative_error=self._error(output, low=False),
                low_replica_error=self._error(output, low=True),
            )
            for output in range(self.outputs)
        ]
        total = max(self.tokens, 1)
        return RouterRow(
            layer=self.name,
            tokens=self.tokens,
            agreement=round_error(self.shared / total),
            same=round_error(self.same / total),
            experts=tuple(experts),
        )

    def _error(self, output: int, *, low: bool) -> float | None:
        found = self.sums.get((output, low))
        if found is None:
            return None
        _, wrong, energy = found
        return round_error((wrong / energy) ** 0.5) if energy else round_error(wrong**0.5)


def _paired(source: Module, artifact: Module) -> list[_LayerPair]:
    """The layers with experts that both have, by name; the first operation of a layer counts."""
    first: dict[str, ExpertsOp] = {}
    for op in artifact.op.walk():
        if isinstance(op, ExpertsOp):
            first.setdefault(layer_of_experts(op), op)
    pairs: dict[str, _LayerPair] = {}
    for op in source.op.walk():
        if isinstance(op, ExpertsOp):
            name = layer_of_experts(op)
            if name in first and name not in pairs:
                pairs[name] = _LayerPair(name, op, first[name], len(op.stored))
    return list(pairs.values())


@dataclass
class _Taps:
    """Watches both runs of a batch."""

    layers: Sequence[_LayerPair]
    before: dict[Operation, _Seen] = field(default_factory=dict)
    after: dict[Operation, _Seen] = field(default_factory=dict)
    # what routers chose, before the choice of a replica left slots out
    choices: dict[Operation, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of_source(self, seen: Observation) -> None:
        """Notes what experts of the source read."""
        for layer in self.layers:
            if seen.op is layer.before and layer.is_comparable:
                op = layer.before
                self.before[op] = _Seen(seen.frame, *(seen.operand(value) for value in (op.x, op.ids, op.gates)))

    def of_artifact(self, seen: Observation) -> None:
        """Notes what experts of the artifact read."""
        if isinstance(seen.op, ReplicaOp):
            self.choices[seen.op] = (seen.operand(seen.op.ids), seen.operand(seen.op.gates))
        for layer in self.layers:
            if seen.op is layer.after and layer.is_comparable:
                choice = layer.after.ids.defining_op
                if isinstance(choice, ReplicaOp):
                    ids, gates = self.choices[choice]
                else:
                    ids, gates = seen.operand(layer.after.ids), seen.operand(layer.after.gates)
                self.after[seen.op] = _Seen(seen.frame, seen.operand(layer.after.x), ids, gates)

    def compare(self) -> None:
        """Compares what was seen, and forgets it."""
        for layer in self.layers:
            if layer.before in self.before and layer.after in self.after:
                layer.compare(self.before[layer.before], self.after[layer.after])
        self.before.clear()
        self.after.clear()
        self.choices.clear()


def _expert_output(op: ExpertsOp, frame: Frame, x: torch.Tensor, output: int) -> torch.Tensor:
    """What the expert that `output` names makes of rows x [n, H] with gate 1."""
    values: dict[Value, torch.Tensor] = {
        op.x: x,
        op.ids: torch.full((len(x), 1), output, dtype=torch.int64),
        op.gates: torch.ones(len(x), 1),
    }
    with torch.no_grad():
        return prepare(op)(Frame(frame.settings, frame.symbols, values))[0]


def _run(module: Module, ids: NDArray[np.int64], tap: Observer) -> None:
    batch = TokenBatch(ids, np.ones_like(ids))
    with torch.no_grad():
        executor = Executor(module.op, module.weights, keep_weights=False)
        executor.run(function_inputs(module.main, batch), observers=[tap])
