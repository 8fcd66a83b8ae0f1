"""Compiles dense and Mixture-of-Experts models through an MLIR-style IR into verified artifacts.

`load` and `compile` are the Python forms of the command line. Importing this package is cheap: torch, onnx and
transformers are imported only when one of them is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.api import compile, load, run_passes, write_checkpoint
    from moec.artifact.compilation import CompileResult
    from moec.module import Module

__version__ = "0.1.0"
__all__ = ["CompileResult", "Module", "__version__", "compile", "load", "run_passes", "write_checkpoint"]

_LAZY = {
    "CompileResult": "moec.artifact.compilation",
    "compile": "moec.api",
    "load": "moec.api",
    "run_passes": "moec.api",
    "write_checkpoint": "moec.api",
    "Module": "moec.module",
}


def __getattr__(name: str) -> Any:
    """Imports the module that defines `name` at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
