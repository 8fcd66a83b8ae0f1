"""The greedy driver: applies patterns to operations from a worklist until none applies."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moec.ir.operation import Operation, Value
from moec.rewrite.pattern import Refusal, RewriteError, RewritePattern, Rewriter

# Rewrites that are always allowed, so that a fragment of one or two operations can go through a long chain.
MINIMUM_BUDGET = 100


@dataclass(frozen=True)
class RewriteResult:
    """What a run of the driver did.

    `changed` counts the rewrites of each pattern by its name, `erased` the dead pure operations that the driver
    removed. `refusals` are of operations that are still there. Without `converged` the budget was used up; `last`
    names the patterns of the last rewrites, most frequent first.
    """

    changed: dict[str, int]
    erased: int
    refusals: tuple[Refusal, ...]
    converged: bool
    last: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.changed) or self.erased > 0

    def require_convergence(self) -> None:
        """Raises RewriteError, naming the patterns, if the driver gave up."""
        if not self.converged:
            raise RewriteError(
                f"the patterns do not come to an end: after {sum(self.changed.values())} rewrites "
                f"{', '.join(self.last)} still apply",
                hint="two patterns that undo each other, or one that matches its own result, must be told apart",
            )


def apply_patterns(root: Operation, patterns: Sequence[RewritePattern], *, max_iterations: int = 10) -> RewriteResult:
    """Applies `patterns` to every operation inside `root`, again wherever something changed, until none applies.

    Pure operations without uses are erased on the way. The driver stops, with `converged` false, after
    `max_iterations` rewrites for each operation that was there at the start.

    Raises:
        RewriteError: a pattern said that it changed nothing although it did.
    """
    return _Driver(root, patterns, max_iterations).run()


class _Driver:
    def __init__(self, root: Operation, patterns: Sequence[RewritePattern], max_iterations: int) -> None:
        self.root = root
        self.patterns = sorted(patterns, key=lambda pattern: -pattern.benefit)
        self.by_name: dict[str, list[RewritePattern]] = {}
        # an ordered set: operations come in program order, then those that changed meanwhile
        self.worklist: OrderedDict[Operation, None] = OrderedDict((op, None) for op in root.walk() if op is not root)
        self.budget = max(MINIMUM_BUDGET, max_iterations * len(self.worklist))
        self.changed_count: dict[str, int] = {}
        self.erased_count = 0
        self.refusals: dict[Operation, dict[Refusal, None]] = {}
        # long enough to hold a whole round of a set of patterns that go in circles
        self.recent: deque[str] = deque(maxlen=2 * len(self.worklist) + 20)

    def run(self) -> RewriteResult:
        converged = True
        while self.worklist:
            op, _ = self.worklist.popitem(last=False)
            if op.parent is None or self._erase_if_dead(op):
                continue
            self.refusals.pop(op, None)
            if not self._rewrite(op):
                continue
            self.budget -= 1
            if self.budget <= 0:
                converged = not self.worklist
                break
        refusals = tuple(refusal for found in self.refusals.values() for refusal in found)
        last = tuple(name for name, _ in Counter(self.recent).most_common())
        return RewriteResult(self.changed_count, self.erased_count, refusals, converged, last)

    def _rewrite(self, op: Operation) -> bool:
        operands = op.operands
        for pattern in self._patterns_for(op):
            rewriter = Rewriter(op, self, pattern.name)
            applied = pattern(op, rewriter)
            if rewriter.modified and not applied:
                raise RewriteError(
                    f"the pattern {pattern.name} changed {op.name} but says that it did not", where=str(op.location)
                )
            if applied:
                self.changed_count[pattern.name] = self.changed_count.get(pattern.name, 0) + 1
                self.recent.append(pattern.name)
                if op.parent is not None:
                    self.changed(op)
                # what the operation read before may be dead now
                self._add_definers(operands)
                return True
            for refused, refusal in rewriter.refusals:
                self.refusals.setdefault(refused, {})[refusal] = None
        return False

    def _patterns_for(self, op: Operation) -> list[RewritePattern]:
        found = self.by_name.get(op.name)
        if found is None:
            found = self.by_name[op.name] = [pattern for pattern in self.patterns if pattern.matches(op)]
        return found

    def _erase_if_dead(self, op: Operation) -> bool:
        if not op.pure or op.has_uses:
            return False
        self.erasing(op)
        op.erase()
        self.erased_count += 1
        return True

    # -- what the rewriter reports --------------------

    def changed(self, op: Operation) -> None:
        self.worklist[op] = None
        # a pattern rooted at a user may look through this operation
        for result in op.results:
            self._add(result.users)

    def erasing(self, op: Operation) -> None:
        going = dict.fromkeys(op.walk())
        for nested in going:
            self.worklist.pop(nested, None)
            self.refusals.pop(nested, None)
        for nested in going:
            self._add_definers(value for value in nested.operands if value.defining_op not in going)

    def _add_definers(self, values: Iterable[Value]) -> None:
        for value in values:
            if value.defining_op is not None:
                self._add([value.defining_op])

    def _add(self, ops: Iterable[Operation]) -> None:
        for op in ops:
            if op is not self.root:
                self.worklist[op] = None
