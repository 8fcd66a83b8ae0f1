"""What an ONNX file may use, by the runtime that has to load it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moec.errors import UsageError


class Target(Enum):
    """Where the ONNX file has to run."""

    PORTABLE = "portable"
    ORT_CPU = "ort-cpu"

    @property
    def profile(self) -> TargetProfile:
        return _PROFILES[self]


@dataclass(frozen=True)
class TargetProfile:
    """The pinned versions of a target.

    `onnx.helper` defaults to the newest opset and IR version, which the newest ONNX Runtime refuses, so both are fixed.
    `oldest_runtime` is the first onnxruntime that loads them.
    """

    opset: int
    ir_version: int
    contrib: bool
    oldest_runtime: str
    description: str


_PROFILES = {
    Target.PORTABLE: TargetProfile(
        opset=21,
        ir_version=10,
        contrib=False,
        oldest_runtime="1.22",
        description="ai.onnx operators only: any ONNX runtime",
    ),
    Target.ORT_CPU: TargetProfile(
        opset=23,
        ir_version=11,
        contrib=True,
        oldest_runtime="1.23",
        description="ai.onnx and com.microsoft operators that the CPU provider of ONNX Runtime has",
    ),
}


def parse_target(text: str) -> Target:
    """The target called `text`; raises UsageError with the known names."""
    for target in Target:
        if target.value == text:
            return target
    raise UsageError(
        f"there is no ONNX target {text!r}", hint=f"choose one of {', '.join(target.value for target in Target)}"
    )
