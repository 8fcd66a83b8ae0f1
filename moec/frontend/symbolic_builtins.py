"""Python's own min and max on sizes of any value.

`min(top_k, keys.shape[1])` compares the sizes, and so a trace would hold only for one outcome. While
`symbolic_builtins` is open, the source files of a model see forms of min and max that keep the choice as a size.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def symbolic_builtins(model: nn.Module) -> Iterator[None]:
    """Replaces min and max in the files that define the parts of `model`, unless such a file defines its own."""
    replacements = {
        "min": _keeping_choice(builtins.min, torch.sym_min),
        "max": _keeping_choice(builtins.max, torch.sym_max),
    }
    names = {type(part).__module__ for part in model.modules()}
    files = [
        sys.modules[name].__dict__ for name in sorted(names) if name in sys.modules and not name.startswith("torch.")
    ]
    changed = [(file, name) for file in files for name in replacements if name not in file]
    for file, name in changed:
        file[name] = replacements[name]
    try:
        yield
    finally:
        for file, name in changed:
            del file[name]


def _keeping_choice(ordinary: Callable[..., Any], symbolic: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def choose(*values: Any, **options: Any) -> Any:
        if len(values) == 2 and not options and any(isinstance(value, torch.SymInt) for value in values):
            return symbolic(*values)
        return ordinary(*values, **options)

    return choose
