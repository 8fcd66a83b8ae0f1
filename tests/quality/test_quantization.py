"""Packed experts on trained models: orderings of methods and of bits, recipes at equal stored bytes, and budgets."""

from __future__ import annotations

import numpy as np
import pytest

import moec
from tests.quality.bit_budget import compare
from tests.quality.harness import SEEDS, calibrated, increases, measure
from tests.quality.packed_experts import outcome, outcomes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quality-quantization")]

MODELS = ("scratch", "upcycled")
RECIPE_MODELS = (*MODELS, "tiny-moe")


def seeds_of(name: str, options: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return increases(name, f"quantize{{{options}}}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", ["bits=3 group=32", "bits=2 group=32", "kind=ternary group=row"])
def test_second_order_is_far_better_than_nearest_codes(name: str, options: str) -> None:
    """A margin of 1.8 in the error of layers with every seed, and in the loss over all; 3 bits cost so little that the
    loss of a single seed is not told to a third of it by the windows that are measured."""
    nearest = outcome(name, "nearest codes", f"quantize{{{options}}}", SEEDS[:1])
    second = outcome(name, "GPTQ", f"quantize{{{options} method=gptq}}")
    print(f"{name} {options}: nearest {nearest.errors} {nearest.increases}, GPTQ {second.errors} {second.increases}")
    assert (second.errors < nearest.error / 1.8).all() and (second.increases < nearest.increase).all()
    assert second.increase < nearest.increase / 1.8


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bits_lose_more(name: str) -> None:
    trits = seeds_of(name, "kind=ternary group=row method=gptq")
    two, three, four, eight = (seeds_of(name, f"bits={bits} group=32 method=gptq") for bits in (2, 3, 4, 8))
    assert (trits > 1.5 * two).all() and (two > 2 * three).all() and (three > four).all() and (eight < three).all()


@pytest.mark.parametrize("name", MODELS)
def test_groups_lose_less_than_rows(name: str) -> None:
    groups, rows = (seeds_of(name, f"bits=2 group={group} method=gptq") for group in ("32", "row"))
    assert (groups < rows).all()


@pytest.mark.parametrize("name", MODELS)
def test_bands_by_energy(name: str) -> None:
    """CAMERA: 8, 4 and 2 bits by energy cost less than the same bits the other way round; 4, 3 and 2 no more than 3."""
    bands = "allocate-bits{{unit=micro bits={} shares={} group=16}},quantize{{planned group=16}}"
    by_energy = increases(name, bands.format("8,4,2", "0.1,0.3,0.6"))
    reverse = increases(name, bands.format("2,4,8", "0.6,0.3,0.1"))
    assert (by_energy < 0.8 * reverse).all()
    mixed = increases(name, bands.format("4,3,2", "0.25,0.5,0.25"))
    assert (mixed <= increases(name, "quantize{bits=3 group=16}")).all()


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bits_within_a_bound_of_the_loss(name: str) -> None:
    """EdgeMoE: the wider the bound, the fewer bits on average, all fewer than the uniform choice that keeps it; and
    what is lost is less than if experts were chosen by chance, which lies between the uniform choices."""
    four, two = (increases(name, f"quantize{{bits={bits} group=32}}", seeds=(0,))[0] for bits in (4, 2))
    averages = []
    for share in (0.05, 0.2, 0.5):
        module = calibrated(name)
        bound = share * (two - four)
        moec.run_passes(module, f"allocate-bits{{objective=single-drop bits=2,4 max-loss={bound:g} group=32}}")
        assert module.bits is not None
        average = module.bits.average
        moec.run_passes(module, "quantize{planned group=32}")
        averages.append(average)
        found, chance = measure(name, module).increase, four + (4 - average) / 2 * (two - four)
        print(f"{name} bound {bound:.4f}: {average:.2f} bits, {found:+.4f}, by chance {chance:+.4f}")
        assert found < chance
    assert 4 > averages[0] > averages[1] > averages[2] > 2


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("name", RECIPE_MODELS)
def test_the_best_recipes_at_equal_stored_bytes(name: str, bits: int) -> None:
    """Three seeds; less error of layers at every number of bits, and less loss from 3 bits down."""
    best, rivals = outcomes(name, bits)
    for rival in rivals:
        print(f"{name} {bits} {rival.title}: {rival.error:.5f} {rival.increase:+.5f}")
        assert best.bytes <= rival.bytes
        assert (best.errors < 0.95 * rival.errors).all()
        if bits <= 3:
            assert best.increase < rival.increase
    print(f"{name} {bits} {best.title}: {best.error:.5f} {best.increase:+.5f}")


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_with_bits_beats_uniform_plans(name: str) -> None:
    """Also that no uniform plan as small is better at or below a quarter of the bytes."""
    quarter, sixth = compare(name)
    for found in (quarter, sixth):
        print(found.line())
        assert found.solved.share <= found.budget + 0.002
        assert found.solved.increase <= min(found.best_uniform(mixed=mixed).increase for mixed in (False, True))
    assert quarter.solved.increase <= 0.65 * quarter.best_uniform(mixed=False).increase
    assert sixth.solved.increase < sixth.frontier
