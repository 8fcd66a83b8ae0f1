"""Prints what printing, parsing and verifying IR cost: `python -m tests.benchmarks.ir [operations ...]`.

Bars for 5,000 operations in CPU seconds: print < 0.3, parse < 0.8, verify < 0.1.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from moec.dialects.builtin import FuncOp, ModuleOp
from moec.ir import Operation, Value, parse_module, print_operation, verify
from tests.ir.build import BATCH_SEQ, HIDDEN, append_layer, f32

REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """CPU seconds, each the least of several runs, for a module of `operations`."""

    operations: int
    print: float
    parse: float
    verify: float


def large_module(operations: int) -> ModuleOp:
    """MoE layers one after another, with norms, views and locations, until there are at least `operations`."""
    function = FuncOp.build("main", [f32(*BATCH_SEQ, HIDDEN)], arg_names=["x"])
    x: Value = function.arguments[0]
    count, layer = 0, 0
    while count < operations:
        first = function.body.last
        x = append_layer(function.body, x, f"model.layers.{layer}")
        added = function.body.first if first is None else first.next
        while added is not None:
            count += sum(1 for _ in added.walk())
            added = added.next
        layer += 1
    function.finish([x], ["y"])
    return ModuleOp.build([function])


def least(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """The least CPU seconds of several runs: noise of a shared machine only ever adds."""
    best = float("inf")
    gc.collect()
    for _ in range(repeats):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def measure(operations: int, repeats: int = REPEATS) -> Cost:
    """Builds a module and times its text and its verifier."""
    module: Operation = large_module(operations)
    text = print_operation(module, locations=True)
    return Cost(
        sum(1 for _ in module.walk()),
        least(lambda: print_operation(module, locations=True), repeats),
        least(lambda: parse_module(text), repeats),
        least(lambda: verify(module), repeats),
    )


def main(arguments: list[str]) -> None:
    print(f"{'operations':>10}  {'print s':>8}  {'parse s':>8}  {'verify s':>8}")
    for operations in map(int, arguments or ("5000", "50000")):
        cost = measure(operations)
        print(f"{cost.operations:10d}  {cost.print:8.3f}  {cost.parse:8.3f}  {cost.verify:8.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
