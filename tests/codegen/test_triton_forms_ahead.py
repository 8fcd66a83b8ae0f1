"""Kernels of layers that no table of tiles lists, compiled for sm90 without a GPU: they fit and do not spill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen.triton.activation import LINEAR
from moec.codegen.triton.ahead import compile_launch
from moec.codegen.triton.architectures import architecture
from moec.codegen.triton.emit import write_package
from moec.codegen.triton.metrics import measure
from moec.codegen.triton.spec import FLOAT, Factors, LayerKind, MatrixFormat
from moec.codegen.triton.tuning import large_layer

_TWO_LEVELS = (MatrixFormat(2, 1, two_levels=True),)
_LAUNCHES_OF_ALL = frozenset({"count_slots", "scan_counts", "place_slots", "combine", "route"})


def _kinds() -> dict[str, LayerKind]:
    large = large_layer((FLOAT,))
    return {
        "every form at once": replace(
            large,
            experts=66,
            width=0,
            activations=(*large.activations, LINEAR),
            biases=True,
            scattered=(True, True),
            optional=(True, True),
            factors=Factors(512, True, 1024, 512, True, 512),
            shared_gates=(-1, 0),
        ),
        "trits of two levels": large_layer(_TWO_LEVELS),
        "trits and zero points": large_layer((MatrixFormat(2, 1), MatrixFormat(4, 8, 32, zero_points=True))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["every form at once", "trits of two levels", "trits and zero points"])
def test_no_kernel_spills(name: str, tmp_path: Path) -> None:
    package, target = write_package([_kinds()[name]], tmp_path), architecture("sm90")
    launches = [launch for launch in package.launches(target) if launch.name not in _LAUNCHES_OF_ALL]
    assert len(launches) > 5
    for launch in launches:
        assert measure(compile_launch(launch, target, package.element)).spills == 0, launch


@pytest.mark.slow
def test_one_token_is_a_constant(tmp_path: Path) -> None:
    """Triton makes a constant of an argument that is 1, which is no tensor then."""
    package, target = write_package([_kinds()["every form at once"]], tmp_path), architecture("sm90")
    for launch in package.launches(target):
        if "tokens" in launch.function.arg_names and launch.name in ("gate_up_slots", "input_right_slots"):
            one = replace(launch, constants=(*launch.constants, ("tokens", 1)))
            assert measure(compile_launch(one, target, package.element)).products > 0
