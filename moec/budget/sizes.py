"""Sizes as people write them: a share, or bytes with a unit."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A share of the bytes of all experts, or bytes of all weights of the model; one of them is None."""

    share: float | None
    bytes: int | None


def parse_budget(text: str) -> Budget:
    """`60%`, `4GiB`, `350 MB`, `123456`; raises ValueError for other text and for shares outside of 0..100 %."""
    found = _BUDGET.fullmatch(text.strip())
    if found is None or (found.group(2) != "%" and found.group(2).lower() not in _UNITS):
        raise ValueError(f"{text!r} is no budget: write a share such as 60%, or bytes such as 4GiB")
    number = float(found.group(1))
    if found.group(2) == "%":
        if not 0 <= number <= 100:
            raise ValueError(f"{text} is not within 0% to 100%")
        return Budget(number / 100, None)
    return Budget(None, int(number * _UNITS[found.group(2).lower()]))


def format_size(size: float) -> str:
    """`size` bytes with a binary unit, such as `11.8 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
