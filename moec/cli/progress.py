"""Progress of long work: a line that rich redraws on a terminal, and nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str], None]
"""Called with the name of the step that starts."""


@contextmanager
def progress() -> Iterator[Report]:
    """Gives a function that shows the step at work; it shows nothing if standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda step: status.update(step)
