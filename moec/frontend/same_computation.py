"""Whether two modules compute the same function of their inputs and parameters, by what they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype, torch.device, torch.Size)


def same_computation(first: nn.Module, second: nn.Module) -> bool:
    """True if both are of one class and differ in nothing but the values of their parameters.

    They then trace to the same program. What cannot be compared (buffers, objects that are not the same one) counts as
    a difference.
    """
    return type(first) is type(second) and _same(vars(first), vars(second))


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, nn.Module):
        return same_computation(first, second)
    if isinstance(first, nn.Parameter):
        return bool(first.shape == second.shape and first.dtype == second.dtype)
    if isinstance(first, dict):
        # the order matters: nn.Sequential runs its modules in it
        return list(first) == list(second) and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and not isinstance(first, torch.Size):
        return len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, _PLAIN) and bool(first == second)
