"""Packed experts on trained models: orderings of methods and of bits, and recipes at equal stored bytes."""

from __future__ import annotations

import pytest

import moec
from moec.frontend.model_kind import ModelKind
from moec.pipeline.recipes import find_recipe
from tests.quality.harness import Measured, calibrated, compress, increases, measure

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-quantization")]

MODELS = ("scratch", "upcycled")


def increase(name: str, options: str) -> float:
    return float(increases(name, f"quantize{{{options}}}", seeds=(0,))[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", ["bits=2 group=32", "kind=ternary group=row"])
def test_second_order_is_far_better_than_nearest_codes(name: str, options: str) -> None:
    assert increase(name, f"{options} method=gptq") < 0.6 * increase(name, options)


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bits_lose_more(name: str) -> None:
    losses = [increase(name, f"bits={bits} group=32 method=gptq") for bits in (2, 3, 4)]
    losses = [increase(name, "kind=ternary group=row method=gptq"), *losses]
    assert losses[0] > 1.5 * losses[1] > 3 * losses[2] and losses[3] < losses[2]


def recipe(name: str, bits: int) -> Measured:
    """`best<bits>` behind the calibration that the harness has made."""
    text = find_recipe(f"best{bits}", ModelKind.MOE).text()
    _, _, rest = text.partition(",")
    assert text.startswith("calibrate,")
    module = calibrated(name)
    moec.run_passes(module, rest)
    return measure(name, module)


@pytest.mark.parametrize("name", MODELS)
def test_the_best_recipe_is_far_better_than_nearest_codes_at_equal_bytes(name: str) -> None:
    best, rounded = recipe(name, 3), compress(name, "quantize{bits=3 group=32}")
    # zero points of a row are filled up to whole bytes
    assert best.expert_bytes <= 1.01 * rounded.expert_bytes
    assert best.increase < 0.7 * rounded.increase
