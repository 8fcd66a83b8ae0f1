"""Requests to end a run (Ctrl-C, SIGTERM) that neither get lost nor come at a moment when a folder is half moved.

Python turns such a signal into a KeyboardInterrupt in whatever code runs at that moment. In a destructor, in a callback
of a weak reference or in one from C there is nobody to raise it to: it is printed and forgotten, and the run would go
on to its end. So requests are remembered here, and long work asks at its joints.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class _State:
    requested: bool = False
    held: int = 0


_state = _State()


@contextmanager
def watched() -> Iterator[None]:
    """Remembers the requests that arrive while the block runs, and raises KeyboardInterrupt for each.

    A process that was started to ignore Ctrl-C goes on to ignore it. Does nothing in a thread beside the main one,
    where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.requested = False
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, _on_request) for number in numbers}
    report = sys.unraisablehook

    def report_the_rest(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)

    sys.unraisablehook = report_the_rest
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in previous.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Whether a request arrived since `watched` began."""
    return _state.requested


def heed() -> None:
    """Raises KeyboardInterrupt if a request arrived, whatever became of the exception it was raised as."""
    if _state.requested and not _state.held:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Lets the block run to its end; a request that arrives meanwhile raises KeyboardInterrupt behind it."""
    _state.held += 1
    before = _state.requested
    try:
        yield
    finally:
        _state.held -= 1
    if not before:
        heed()


def _on_request(signal_number: int, frame: FrameType | None) -> None:
    _state.requested = True
    if not _state.held:
        raise KeyboardInterrupt
