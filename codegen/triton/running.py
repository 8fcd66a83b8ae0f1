"""Runs a package of kernels on given rows in a process of its own: on a GPU, or in Triton's interpreter.

The interpreter is chosen when triton is imported, for a whole process, so that it cannot be switched on here.
`python -m moec.codegen.triton.running FOLDER` is that process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file

from moec.codegen.triton.interpreter import repair
from moec.errors import UsageError, VerificationError

INTERPRET = "TRITON_INTERPRET"
_INPUTS, _PLAN, _OUTPUTS = "inputs.safetensors", "plan.json", "outputs.safetensors"


class Place(Enum):
    """Where kernels run."""

    GPU = "on the GPU"
    INTERPRETER = "in the interpreter"


def default_place() -> Place:
    """A GPU where there is one."""
    return Place.GPU if torch.cuda.is_available() else Place.INTERPRETER


@dataclass(frozen=True)
class LayerRows:
    """Rows float32 [tokens, hidden size] for the layer `layer` of a package, or only for its router."""

    package: Path
    layer: int
    rows: torch.Tensor
    only_router: bool = False


@dataclass(frozen=True)
class LayerOutput:
    """The layer's output float32 [tokens, hidden size], and the router outputs and gates [tokens, k] that it chose.

    Where only the router was asked for, the output has no rows.
    """

    y: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor


def run_layers(requests: Sequence[LayerRows], place: Place) -> list[LayerOutput]:
    """What layers make of rows, in the order of the requests, all in one process.

    Raises UsageError without triton, VerificationError where a package does not run.
    """
    require_triton("running its kernels")
    with tempfile.TemporaryDirectory(prefix="moec-kernels-") as scratch:
        folder = Path(scratch)
        save_file(
            {f"{number}": item.rows.float().contiguous().clone() for number, item in enumerate(requests)},
            str(folder / _INPUTS),
        )
        plan = [[str(item.package.resolve()), item.layer, item.only_router] for item in requests]
        (folder / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        environment = dict(os.environ) | {INTERPRET: "1" if place is Place.INTERPRETER else "0"}
        command = [sys.executable, "-m", __name__, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / _OUTPUTS).is_file():
            lines = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
            where = str(requests[0].package) if requests else ""
            raise VerificationError(f"the kernels do not run: {lines[-1]}", where=where)
        found = load_file(str(folder / _OUTPUTS))
    return [
        LayerOutput(found[f"{number}.y"], found[f"{number}.ids"], found[f"{number}.gates"])
        for number in range(len(requests))
    ]


def require_triton(purpose: str) -> None:
    """Raises UsageError where triton is not installed; `purpose` says what needs it."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            f"triton is not installed, and {purpose} needs it",
            hint="install triton (Linux), or compile with --no-verify and check the artifact elsewhere",
        )


def import_package(package: Path) -> ModuleType:
    """The package of an artifact, imported from its folder, whatever else has its name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[name]
    specification = importlib.util.spec_from_file_location(package.name, package / "__init__.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[package.name] = module
    specification.loader.exec_module(module)
    return module


def _main(folder: Path) -> None:
    device = "cuda"
    if os.environ.get(INTERPRET) == "1":
        repair()
        device = "cpu"
    found: dict[str, torch.Tensor] = {}
    rows = load_file(str(folder / _INPUTS))
    loaded = ""
    for number, (path, layer, only_router) in enumerate(json.loads((folder / _PLAN).read_text(encoding="utf-8"))):
        if path != loaded:
            package, loaded = import_package(Path(path)), path
        block = package.load_layer(layer, device)
        with torch.no_grad():
            x = rows[f"{number}"].to(device)
            ids, gates = block.choose(x)
            y = x[:0] if only_router else block(x).float()
            results = {"y": y, "ids": ids, "gates": gates}
        found.update({f"{number}.{name}": value.cpu() for name, value in results.items()})
    save_file(found, str(folder / _OUTPUTS))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
