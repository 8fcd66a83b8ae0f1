"""One walk back: the derivative of the text's loss by the output of every `moe.experts` and dense block.

Each segment runs again under torch's gradient mode, from the values that stood in front of it. So memory holds those
values, one layer's weights and what one layer on one batch saves for its derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from moec.calibration.observation import BatchPlace
from moec.errors import UsageError
from moec.ir import Operation, Value
from moec.reference.executor import Execution, Executor
from moec.reference.frame import Observation
from moec.reference.layers import AFTER_LAYERS, Segment

Snapshot = dict[Value, torch.Tensor]
"""The values that stood in front of a segment."""


def walk_back(
    executor: Executor,
    segments: Sequence[Segment],
    snapshots: Mapping[int, list[Snapshot]],
    places: Sequence[BatchPlace],
    names: Mapping[Operation, str],
) -> Iterator[tuple[int, dict[str, float], dict[str, torch.Tensor]]]:
    """(position, mean squared norm, rows [R, H] of the reservoir), the latter two by layer, for each segment from the
    last one to the first one with a snapshot. Snapshots are emptied on the way; `names` are the operations whose
    outputs are asked for, with the names of their layers.

    The loss is the sum over all tokens that have a next one of -log p(next), in nats.
    """
    total = sum(int(place.mask.sum()) for place in places)
    count = sum(len(place.rows) for place in places)
    outputs: dict[Operation, torch.Tensor] = {}

    def note(seen: Observation) -> None:
        if seen.op in names:
            outputs[seen.op] = seen.results[0]

    after: list[Snapshot | None] = [None] * len(places)
    with ExitStack() as stack:
        executions = [stack.enter_context(executor.session(place.inputs, observers=[note])) for place in places]
        for position in range(len(segments) - 1, min(snapshots) - 1, -1):
            energy: dict[str, float] = {}
            rows: dict[str, torch.Tensor] = {}
            with ExitStack() as kept:
                if segments[position].name != AFTER_LAYERS:
                    kept.enter_context(executor.weights_kept())
                for number, (execution, place) in enumerate(zip(executions, places, strict=True)):
                    outputs.clear()
                    before = snapshots[position][number]
                    after[number], found = _step_back(
                        execution, segments[position], before, after[number], place, outputs
                    )
                    before.clear()
                    for op, gradient in found.items():
                        flat = gradient.reshape(-1, gradient.shape[-1])
                        name = names[op]
                        real = flat if place.kept is None else flat[place.kept]
                        energy[name] = energy.get(name, 0.0) + float(real.double().square().sum()) / total
                        rows.setdefault(name, torch.zeros(count, flat.shape[-1], dtype=flat.dtype))
                        rows[name][place.target] = flat[place.rows]
            yield position, energy, rows


def _step_back(
    execution: Execution,
    segment: Segment,
    before: Snapshot,
    after: Snapshot | None,
    place: BatchPlace,
    outputs: dict[Operation, torch.Tensor],
) -> tuple[Snapshot, dict[Operation, torch.Tensor]]:
    """(derivatives by the values in front of the segment, by the outputs of the layers asked for in it).

    `after` are the derivatives by the values behind it, None behind the last one.
    """
    values = execution.values
    values.clear()
    values.update(before)
    leaves = {value: tensor.detach().requires_grad_() for value, tensor in before.items() if tensor.is_floating_point()}
    values.update(leaves)
    with torch.enable_grad():
        execution.run(segment.steps)
        if after is None:
            sources = [_loss(next(iter(execution.results().values())), execution, place)]
            given: list[torch.Tensor | None] = [None]
            passed: Snapshot = {}
        else:
            made = {value: gradient for value, gradient in after.items() if value not in leaves}
            passed = {value: gradient for value, gradient in after.items() if value in leaves}
            sources, given = [values[value] for value in made], list(made.values())
    wanted = [*leaves.values(), *outputs.values()]
    pairs = [(tensor, gradient) for tensor, gradient in zip(sources, given, strict=True) if tensor.requires_grad]
    found: tuple[torch.Tensor | None, ...] = (None,) * len(wanted)
    if pairs:
        found = torch.autograd.grad(
            [tensor for tensor, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
        )
    values.clear()
    result = dict(passed)
    for value, gradient in zip(leaves, found[: len(leaves)], strict=True):
        if gradient is not None:
            result[value] = result[value] + gradient if value in result else gradient
    by_layers = {
        op: torch.zeros_like(tensor) if gradient is None else gradient
        for (op, tensor), gradient in zip(outputs.items(), found[len(leaves) :], strict=True)
    }
    return {value: gradient.detach() for value, gradient in result.items()}, by_layers


def _loss(logits: torch.Tensor, execution: Execution, place: BatchPlace) -> torch.Tensor:
    """Sum of -log softmax(logits)[next token] over the tokens whose next one is real."""
    ids = place.inputs.get("input_ids")
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise UsageError(
            "gradients need a model that gives logits for each of its input tokens",
            hint="calibrate without gradients, and before add-kv-cache",
        )
    scored = (place.mask[:, :-1] * place.mask[:, 1:]).bool()
    if not bool(scored.any()):
        return logits.sum() * 0.0
    return torch.nn.functional.cross_entropy(logits[:, :-1][scored], ids[:, 1:][scored], reduction="sum")
