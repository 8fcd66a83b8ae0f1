"""Gradient steps on the weights of a whole language model, in the reference executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moec.artifact.tokens import TokenBatch, function_inputs
from moec.dialects.builtin import FuncOp, ModuleOp
from moec.dialects.moe import ExpertsOp, RouteOp, WeightFrom
from moec.ir import Operation, TensorType
from moec.passes.building import Builder
from moec.passes.matching import tensor
from moec.reference.executor import Executor
from moec.reference.frame import Observation
from moec.weights.context import WeightContext

Windows = Sequence[NDArray[np.int64]]
"""Token ids of equal length."""

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
) -> Outcome:
    """Trains the weights `names` on `windows`; those with the least loss on `held_out` count, the untrained included.

    The loss is that of the next token, or with a `teacher` the mean divergence of its distribution from the model's;
    held-out losses are always those of the next token.
    """
    student = with_soft_gates(op)
    executor = Executor(student, weights, keep_weights=True)
    sources = {name: source for name, source in _sources(op).items() if name in set(names)}
    values = {name: weights.load(source).float().clone() for name, source in sources.items()}
    trained = {name: value.requires_grad_() for name, value in values.items()}
    before = best = _loss_of(executor, trained, held_out, schedule.batch)
    kept: dict[str, torch.Tensor] = {}
    if not trained:
        return Outcome(before, before, {})
    optimizer = torch.optim.Adam(list(trained.values()), lr=schedule.rate)
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
    """A copy in which gates that are one are p / p for the softmax scores p, where the divisor has no derivative.

    Values stay; the router gets the derivative of log p, without which it would learn nothing.
    """
    clone = op.clone()
    assert isinstance(clone, ModuleOp)
    for experts in [item for item in clone.walk() if isinstance(item, ExpertsOp)]:
        route = experts.gates.defining_op
        if isinstance(route, RouteOp) and route.routing.weight_from is WeightFrom.ONE:
            _soften(experts, route)
    return clone


def _soften(experts: ExpertsOp, route: RouteOp) -> None:
    build = Builder(lambda made: made.insert_before(experts))
    scores, gates = tensor(route.logits), tensor(route.gates)
    kind = TensorType(gates.shape, scores.dtype)
    softmax = build.aten("softmax.int", {"self": route.logits}, scores, dim=-1, dtype=None)
    chosen = build.aten("gather.default", {"self": softmax, "index": route.ids}, kind, dim=1, sparse_grad=False)
    fixed = build.aten("detach.default", {"self": chosen}, kind)
    # 1, or 1 where p is so small that p / p is no number
    ratio = build.aten("div.Tensor", {"self": build.aten("add.Scalar", {"self": chosen}, kind, other=1e-30, alpha=1),
                                      "other": build.aten("add.Scalar", {"self": fixed}, kind, other=1e-30, alpha=1)},
                       kind)  # fmt: skip
    soft = build.aten("mul.Tensor", {"self": route.gates, "other": ratio}, gates)
    experts.set_operand(2, soft)


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
