"""How much anonymous memory this process holds: what it allocated, without the pages of files that it mapped."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def anonymous_bytes() -> int:
    """Anonymous resident memory (RssAnon) of this process in bytes; 0 where the system does not tell."""
    if not _STATUS.is_file():
        return 0
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def give_back_freed_memory() -> None:
    """Lets glibc return every freed allocation of a MiB or more to the system at once; does nothing elsewhere.

    By default glibc raises that size with each large allocation that is freed, so that weights which come and go leave
    holes that stay resident: several layers' worth.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)


class MemoryWatch:
    """Looks at the anonymous memory every `interval` seconds while its block runs; `peak` is the most it saw."""

    def __init__(self, interval: float = 0.05) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moec memory watch", daemon=True)
        self.peak = anonymous_bytes()

    def look(self) -> int:
        """Takes one more look and returns the peak so far."""
        self.peak = max(self.peak, anonymous_bytes())
        return self.peak

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()
