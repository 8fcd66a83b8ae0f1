"""Gradient steps on the weights of a whole language model, in the reference executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifact.tokens import TokenBatch, function_inputs
from moec.dialects.builtin import FuncOp, ModuleOp
from moec.dialects.moe import RouteOp, WeightFrom
from moec.experts import MoeLayer, find_moe_layers
from moec.ir import Operation, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import tensor
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.weights.context import WeightContext

Windows = Sequence[NDArray[np.int64]]
"""Token ids of equal length."""

_TINY = 1e-20
"""Keeps the logits of a router of zeros from a division by zero."""

Teacher = Callable[[torch.Tensor], torch.Tensor]
"""Logits [batch, seq, vocabulary] of token ids int64 [batch, seq], to learn from."""


@dataclass(frozen=True)
class Schedule:
    """`steps` of Adam on `batch` windows each, at `rate` that falls linearly to a tenth of it.

    `balance` weighs the Switch loss E sum_e f_e p_e of each layer, f_e the share of choices and p_e the mean softmax
    score. Losses are measured at the start, and after each of `checks` equal parts of the steps.
    """

    steps: int
    batch: int
    rate: float
    balance: float
    seed: int
    checks: int = 4


@dataclass(frozen=True)
class Outcome:
    """Held-out losses, nats per token, and the weights of the least one by name, float32; none where no step helped."""

    before: float
    after: float
    weights: Mapping[str, torch.Tensor]


def train(
    op: ModuleOp,
    weights: WeightContext,
    names: Sequence[str],
    windows: Windows,
    held_out: Windows,
    schedule: Schedule,
    teacher: Teacher | None,
    relative: Mapping[str, float] | None = None,
) -> Outcome:
    """Trains the weights `names` on `windows`; those with the least loss on `held_out` count, the untrained included.

    The loss is that of the next token, or with a `teacher` the mean divergence of its distribution from the model's;
    held-out losses are always those of the next token.
    """
    relative = relative or {}
    student = with_soft_gates(op)
    executor = Executor(student, weights, keep_weights=True)
    sources = {name: source for name, source in _sources(op).items() if name in set(names)}
    values = {name: weights.load(source).float().clone() for name, source in sources.items()}
    trained = {name: value.requires_grad_() for name, value in values.items()}
    before = best = _loss_of(executor, trained, held_out, schedule.batch)
    kept: dict[str, torch.Tensor] = {}
    if not trained:
        return Outcome(before, before, {})
    groups = [{"params": [value], "lr": schedule.rate * relative.get(name, 1.0)} for name, value in trained.items()]
    optimizer = torch.optim.Adam(groups, lr=schedule.rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, schedule.steps)
    checks = {schedule.steps * (check + 1) // schedule.checks for check in range(schedule.checks)}
    for step, batch in enumerate(_batches(windows, schedule), start=1):
        optimizer.zero_grad()
        ids = torch.from_numpy(np.stack(batch))
        logits, penalty = _run(executor, trained, ids, balance=schedule.balance > 0)
        loss = next_token_loss(logits, ids) if teacher is None else divergence(logits, teacher(ids))
        (loss + schedule.balance * penalty).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        if step in checks:
            now = _loss_of(executor, trained, held_out, schedule.batch)
            if now < best:
                best = now
                kept = {name: value.detach().clone() for name, value in trained.items()}
    return Outcome(before, best, kept)


def teacher_of(op: ModuleOp, weights: WeightContext) -> Teacher:
    """A model to learn from, which stays as it is."""
    executor = Executor(op, weights, keep_weights=True)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return _run(executor, {}, ids, balance=False)[0]

    return logits


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(next), nats, of logits [batch, seq, vocabulary] and ids [batch, seq]."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean KL(wanted || given) over tokens, nats, of two tables of logits [batch, seq, vocabulary]."""
    given, target = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return torch.nn.functional.kl_div(given, target, reduction="none", log_target=True).sum(-1).mean()


def with_soft_gates(op: ModuleOp) -> ModuleOp:
    """A copy in which gates that are one are p / p, where the divisor has no derivative.

    p is the softmax of the logits divided by their standard deviation over the experts, since routers that are fitted
    to what experts give have logits of any size. Values stay; the router's weights get the derivative of log p, without
    which they would learn nothing. What the router reads gets none: its choice has no derivative by hidden states, and
    log p would drown that of the experts.
    """
    clone = op.clone()
    assert isinstance(clone, ModuleOp)
    for layer in find_moe_layers(clone):
        if layer.route.routing.weight_from is WeightFrom.ONE:
            _soften(layer)
    return clone


def _soften(layer: MoeLayer) -> None:
    experts, route, router = layer.experts, layer.route, layer.router
    build = Builder(lambda made: made.insert_before(experts))
    wide, gates = tensor(route.logits), tensor(route.gates)
    column, kind = TensorType((wide.shape[0], 1), wide.dtype), TensorType(gates.shape, wide.dtype)

    def fixed(value: Value) -> Value:
        return build.aten("detach.default", {"self": value}, tensor(value))

    given: dict[str, Value | tuple[Value, ...]] = {"input": fixed(router.tensor("input"))}
    given["weight"] = router.tensor("weight")
    if router.tensors("bias"):
        given["bias"] = router.tensors("bias")[0]
    logits = build.view(build.aten("linear.default", given, tensor(router.result)), wide.shape)
    mean = build.aten("mean.dim", {"self": logits}, column, dim=(-1,), keepdim=True, dtype=None)
    centred = build.aten("sub.Tensor", {"self": logits, "other": mean}, wide, alpha=1)
    square = build.aten("mul.Tensor", {"self": centred, "other": centred}, wide)
    variance = build.aten("mean.dim", {"self": square}, column, dim=(-1,), keepdim=True, dtype=None)
    positive = build.aten("add.Scalar", {"self": fixed(variance)}, column, other=_TINY, alpha=1)
    deviation = build.aten("sqrt.default", {"self": positive}, column)
    scaled = build.aten("div.Tensor", {"self": centred, "other": deviation}, wide)
    scores = build.aten("softmax.int", {"self": scaled}, wide, dim=-1, dtype=None)
    chosen = build.aten("gather.default", {"self": scores, "index": route.ids}, kind, dim=1, sparse_grad=False)
    ratio = build.aten("div.Tensor", {"self": chosen, "other": fixed(chosen)}, kind)
    experts.set_operand(2, build.aten("mul.Tensor", {"self": route.gates, "other": ratio}, gates))


def _sources(op: Operation) -> dict[str, str]:
    return {str(item.attributes["weight_name"]): str(item.attributes["source"])
            for item in op.walk() if item.name == "moec.weight"}  # fmt: skip


def _batches(windows: Windows, schedule: Schedule) -> Iterator[list[NDArray[np.int64]]]:
    """Windows in passes through all of them, each in another order."""
    generator = np.random.default_rng(schedule.seed)
    order: list[int] = []
    for _ in range(schedule.steps):
        while len(order) < schedule.batch:
            order += generator.permutation(len(windows)).tolist()
        taken, order = order[: schedule.batch], order[schedule.batch :]
        yield [windows[index] for index in taken]


def _run(
    executor: Executor, trained: Mapping[str, torch.Tensor], ids: torch.Tensor, *, balance: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, the sum of the layers' balance losses)."""
    penalties = [torch.zeros(())]

    def watch(seen: Observation) -> None:
        if isinstance(seen.op, RouteOp):
            scores = seen.operand(seen.op.logits).float().softmax(-1)
            experts = scores.shape[1]
            chosen = torch.nn.functional.one_hot(seen.results[0], experts).sum(1) * 1.0
            share = chosen.mean(0) / seen.results[0].shape[1]
            penalties.append(experts * (share * scores.mean(0)).sum())

    inputs = _inputs(executor.function, ids)
    results = executor.run(inputs, overrides=trained, observers=[watch] if balance else ())
    return next(iter(results.values())), torch.stack(penalties).sum()


def _inputs(function: FuncOp, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers = ids.numpy()
    return function_inputs(function, TokenBatch(numbers, np.ones_like(numbers)))


def _loss_of(executor: Executor, trained: Mapping[str, torch.Tensor], windows: Windows, batch: int) -> float:
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch):
            ids = torch.from_numpy(np.stack(windows[start : start + batch]))
            total += float(next_token_loss(_run(executor, trained, ids, balance=False)[0], ids)) * len(ids)
    return total / len(windows)
