"""`measurements.json`: what varies from run to run, and is therefore outside of the manifest and its digests."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from moec.artifact.memory import MemoryWatch
from moec.record import Record

MEASUREMENTS_NAME = "measurements.json"


class Machine(Record):
    """The machine that a measurement was made on."""

    platform: str
    processor: str
    cores: int
    memory_bytes: int


class StepTime(Record):
    """Time of one step in seconds, and the most anonymous memory that the run had held when it ended, in bytes."""

    step: str
    seconds: float = Field(ge=0)
    cpu_seconds: float = Field(ge=0)
    peak_memory_bytes: int = Field(ge=0)


class PassTime(Record):
    """Seconds that a pass took, and seconds that the ledger took to measure what it did."""

    pass_text: str
    seconds: float = Field(ge=0)
    ledger_seconds: float = Field(ge=0)


class Cost(Record):
    """What a compilation costs; memory is the peak of anonymous resident memory."""

    seconds: float = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    disk_bytes: int = Field(ge=0)


class VerificationRow(Record):
    """One comparison: what was compared with what, the largest difference relative to the largest value, its bound."""

    comparison: str
    relative_difference: float
    bound: float
    ties: int = Field(default=0, ge=0)
    tokens: int = Field(ge=0)


class LossRow(Record):
    """Losses on one text, in nats. `subject` is `source` or `artifact`."""

    subject: str
    text: str
    tokens: int
    nats_per_token: float
    nats_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(min(self.nats_per_token, 700.0))


class SpeedRow(Record):
    """Speed of one subject at one task. `bound` is what the memory bandwidth or the matrix product speed allows."""

    task: str
    subject: str
    tokens_per_second: float
    bound_tokens_per_second: float | None = None


class ExpertErrorRow(Record):
    """One router output: the tokens that the source sends to it, and |after - before| / |before| of its expert on them.

    None where it gets no token. `low_replica_error` is that of the expert's second replica, where it has one.
    """

    output: int = Field(ge=0)
    tokens: int = Field(ge=0)
    relative_error: float | None
    low_replica_error: float | None = None


class RouterRow(Record):
    """One layer against the source on the same text.

    `agreement` is the mean share of a token's experts that both choose, by router output, each on its own hidden
    states; `same` the share of tokens whose experts are all the same. What replicas leave out or exchange is no choice
    of the router and does not count. None, with a `note`, where the router has other outputs than the source's.
    """

    layer: str
    tokens: int = Field(ge=0)
    agreement: float | None
    same: float | None
    experts: tuple[ExpertErrorRow, ...] = ()
    note: str = ""


class StoredBits(Record):
    """Bytes of the exported model, counted in its files, for each weight of the source.

    `expert_bytes` are those of tensors of experts, and `padding_bytes` those of no tensor, such as the ends of pages;
    both are part of `bytes`.
    """

    weights: int = Field(ge=0)
    bytes: int = Field(ge=0)
    bits_per_weight: float
    expert_weights: int = Field(ge=0)
    expert_bytes: int = Field(ge=0)
    expert_bits_per_weight: float | None
    padding_bytes: int = Field(ge=0)


class Comparison(Record):
    """What an artifact is against its source, besides losses."""

    text: str
    tokens: int = Field(ge=0)
    routers: tuple[RouterRow, ...]
    stored: StoredBits


class Measurements(Record):
    """The content of measurements.json."""

    source: str
    others: tuple[str, ...] = ()
    calibration: str = ""
    machine: Machine
    steps: tuple[StepTime, ...]
    passes: tuple[PassTime, ...] = ()
    predicted: Cost
    actual: Cost
    verification: tuple[VerificationRow, ...] = ()
    losses: tuple[LossRow, ...] = ()
    speeds: tuple[SpeedRow, ...] = ()


def this_machine() -> Machine:
    """Describes the machine that this process runs on."""
    return Machine(
        platform=platform.platform(terse=True),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


class Stopwatch:
    """Collects the times of the steps of one run, and the peak memory that `memory` saw by the end of each."""

    def __init__(self, memory: MemoryWatch) -> None:
        self.steps: list[StepTime] = []
        self._memory = memory
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time of the block as step `name`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.steps.append(
            StepTime(
                step=name,
                seconds=round(time.perf_counter() - wall, 4),
                cpu_seconds=round(time.process_time() - cpu, 4),
                peak_memory_bytes=self._memory.look(),
            )
        )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
