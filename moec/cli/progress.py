"""Progress of long work: a line that rich redraws on a terminal, and nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moec import interruption

Report = Callable[[str], None]
"""Called with the name of the step that starts."""


@contextmanager
def progress() -> Iterator[Report]:
    """Gives a function that shows the step at work; it shows nothing if standard error is not a terminal.

    The function raises KeyboardInterrupt where a request to end the run got lost in the step before.
    """
    if not sys.stderr.isatty():
        yield lambda step: interruption.heed()
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:

        def show(step: str) -> None:
            interruption.heed()
            status.update(step)

        yield show
