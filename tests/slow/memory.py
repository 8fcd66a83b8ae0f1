"""Runs a command and watches how much anonymous memory its processes hold."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.1


@dataclass(frozen=True)
class WatchedRun:
    """What a command printed, how it ended, its wall-clock seconds, and the most anonymous bytes it held."""

    output: str
    exit_code: int
    seconds: float
    peak_bytes: int


def run_moec(arguments: list[str], log: Path) -> WatchedRun:
    """Runs `moec` with `arguments` in a process of its own; both of its outputs go through the file `log`."""
    start, peak = time.monotonic(), 0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, "-m", "moec", *arguments], stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(INTERVAL)
    return WatchedRun(log.read_text(encoding="utf-8"), process.returncode, time.monotonic() - start, peak)


def _anonymous_bytes(process_id: int) -> int:
    """RssAnon of a process and its children, in bytes; 0 for one that has just ended."""
    folder = Path(f"/proc/{process_id}")
    try:
        status = (folder / "status").read_text(encoding="ascii")
        # of its threads, since looking for children among all processes would take more time than the child itself
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    return own + sum(_anonymous_bytes(int(child)) for child in children)
