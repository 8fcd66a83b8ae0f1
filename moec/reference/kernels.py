"""The table from operations to functions that compute them.

A preparer looks at one operation once, before anything runs, and returns its kernel: a function of the frame that gives
the results. Another dialect joins by `@prepares(ItsOp)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from moec.errors import UnsupportedModelError
from moec.ir import Operation
from moec.reference.frame import Frame

Kernel = Callable[[Frame], Sequence[torch.Tensor]]
Preparer = Callable[[Any], Kernel]
PreparerT = TypeVar("PreparerT", bound=Preparer)

_PREPARERS: dict[type[Operation] | str, Preparer] = {}


def prepares(kind: type[Operation] | str) -> Callable[[PreparerT], PreparerT]:
    """Registers the preparer of an operation class and of its subclasses, or of one operation by its full name."""

    def register(preparer: PreparerT) -> PreparerT:
        _PREPARERS[kind] = preparer
        return preparer

    return register


def prepare(op: Operation) -> Kernel:
    """The kernel of one operation; raises UnsupportedModelError where there is none."""
    for kind in (op.name, *type(op).__mro__):
        if kind in _PREPARERS:
            return _PREPARERS[kind](op)
    raise UnsupportedModelError(f"the reference executor cannot compute {op.name}", where=str(op.location))
