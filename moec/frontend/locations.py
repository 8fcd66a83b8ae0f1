"""Where a node of a trace comes from: the path of its module and the line of the model's code."""

from __future__ import annotations

import re
from pathlib import PurePath

from torch import fx

from moec.ir import Location

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# A trace goes through these on its way from the model's code to the operation.
_MACHINERY = ("/torch/", "/moec/frontend/")


class LocationReader:
    """Reads locations; `prefix` is removed from module paths."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._known: dict[tuple[str, str], Location] = {}

    def of(self, node: fx.Node) -> Location:
        """The location of a node; files are named from their package on, so that it does not depend on the machine."""
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(list(stack.values())))[0] if stack else ""
        path = re.sub(r"^L\['self'\]\.?", "", path)
        name = path.removeprefix(self._prefix) if path != self._prefix.rstrip(".") else ""
        trace = node.meta.get("stack_trace") or ""
        key = (name, trace)
        if key not in self._known:
            file, line = _position(trace)
            self._known[key] = Location(name, file, line, 1 if file else 0)
        return self._known[key]


def _position(trace: str) -> tuple[str, int]:
    frames = [(file, line) for file, line in _FRAME.findall(trace) if not any(part in file for part in _MACHINERY)]
    if not frames:
        return "", 0
    file, line = frames[-1]
    parts = PurePath(file).parts
    if "site-packages" in parts:
        start = len(parts) - 1 - parts[::-1].index("site-packages") + 1
        short = "/".join(parts[start:])
    else:
        short = parts[-1]
    return short, int(line)
