"""Packed experts on trained models: orderings of methods and of bits, recipes at equal stored bytes, and budgets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import moec
from moec.quantization.bit_plan import BitPlan, ExpertBits
from tests.quality.bit_budget import compare, increase
from tests.quality.harness import FIXTURES, SEEDS, calibrated, increases, load, measure
from tests.quality.packed_experts import expert_errors, layer_error, outcome, outcomes

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
def test_training_is_far_better_than_nearest_codes(name: str) -> None:
    """EfficientQAT, 2 bits: codes and scales of one expert at a time, scales on text from end to end, and both."""
    tune = f"tune{{train=scales target=text steps=120 rate=0.001 text={FIXTURES[name].calibration}}}"
    nearest = seeds_of(name, "bits=2 group=32")
    experts = seeds_of(name, "bits=2 group=32 method=block-ap")
    scales = increases(name, f"quantize{{bits=2 group=32}},{tune}")
    both = increases(name, f"quantize{{bits=2 group=32 method=block-ap}},{tune}")
    print(f"{name}: nearest {nearest}, one expert at a time {experts}, scales on text {scales}, both {both}")
    assert (experts < 0.5 * nearest).all() and (both < 0.5 * nearest).all()
    assert (scales < 0.7 * nearest).all()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_that_count_for_an_expert(name: str) -> None:
    """With few tokens those that chose other experts help the worst expert, with many they harm it, and `auto` is as
    good as the better choice. Weights by gates make the layer's errors smaller (MoEQuant)."""
    for sequences, length in ((2, 64), (128, 64)):
        for seed in SEEDS:
            text = f"text={FIXTURES[name].calibration} sequences={sequences} length={length}"
            found = {}
            for policy in ("routed", "all", "auto", "affinity"):
                module = load(name)
                options = f"bits=3 group=32 method=gptq calibration={policy}"
                moec.run_passes(module, f"calibrate{{{text}}},quantize{{{options}}}", seed=seed)
                found[policy] = expert_errors(name, module)
            print(name, sequences, seed, found)
            if sequences == 2:
                assert (
                    found["all"].largest < found["routed"].largest and found["all"].mean < 0.95 * found["routed"].mean
                )
            else:
                assert found["routed"].largest < 0.85 * found["all"].largest
                assert found["affinity"].by_gates < 0.98 * found["routed"].by_gates
            assert found["auto"].mean <= 1.02 * min(found["routed"].mean, found["all"].mean)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("average", "choices"), [(2, "1,2,3"), (3, "2,3,4")])
def test_bits_by_the_errors_of_codes(name: str, average: int, choices: str) -> None:
    """Bits for each matrix by what the codes of GPTQ lose: less than with equal bits, or the same bits for others."""
    rows = []
    for seed in SEEDS:
        equal, chosen = calibrated(name, seed), calibrated(name, seed)
        moec.run_passes(equal, f"quantize{{bits={average} group=32 method=gptq}}")
        options = f"unit=projection method=gptq average={average} bits={choices} group=32"
        moec.run_passes(chosen, f"allocate-bits{{{options}}}")
        plan = chosen.bits
        assert plan is not None and plan.average <= average
        moec.run_passes(chosen, "quantize{planned group=32 method=gptq}")
        chance = calibrated(name, seed)
        generator = np.random.default_rng(seed)
        mixed = {layer: tuple(bits[i] for i in generator.permutation(len(bits))) for layer, bits in plan.layers.items()}
        chance.bits = BitPlan(mixed, plan.average, plan.cost)
        moec.run_passes(chance, "quantize{planned group=32 method=gptq}")
        rows.append([(measure(name, found).increase, layer_error(name, found)) for found in (equal, chosen, chance)])
    losses, errors = np.moveaxis(np.asarray(rows), -1, 0)
    print(name, average, "loss", losses.round(4).tolist(), "error", errors.round(5).tolist())
    assert (errors[:, 1] < 0.9 * errors[:, 0]).all() and (errors[:, 1] < 0.9 * errors[:, 2]).all()
    assert losses[:, 1].mean() < min(losses[:, 0].mean(), losses[:, 2].mean())


@pytest.mark.parametrize("name", MODELS)
def test_bands_by_energy(name: str) -> None:
    """CAMERA: 8, 4 and 2 bits by energy cost less than the same bits for neurons by chance, and those less than the
    other way round; 4, 3 and 2 no more than 3."""
    bands = "allocate-bits{{unit=micro bits={} shares={} group=16}},quantize{{planned group=16}}"
    by_energy = increases(name, bands.format("8,4,2", "0.1,0.3,0.6"))
    reverse = increases(name, bands.format("2,4,8", "0.6,0.3,0.1"))
    assert (by_energy < 0.8 * reverse).all()
    for seed, (least, most) in enumerate(zip(by_energy, reverse, strict=True)):
        module = calibrated(name, seed)
        moec.run_passes(module, "allocate-bits{unit=micro bits=8,4,2 shares=0.1,0.3,0.6 group=16}")
        assert module.bits is not None
        module.bits = _other_neurons(module.bits, seed)
        moec.run_passes(module, "quantize{planned group=16}")
        chance = measure(name, module).increase
        print(f"{name}, seed {seed}: by energy {least:+.4f}, by chance {chance:+.4f}, the other way round {most:+.4f}")
        assert least < 0.8 * chance and chance < 0.9 * most
    mixed = increases(name, bands.format("4,3,2", "0.25,0.5,0.25"))
    assert (mixed <= increases(name, "quantize{bits=3 group=16}")).all()


def _other_neurons(plan: BitPlan, seed: int) -> BitPlan:
    """Bands of the same sizes with neurons by chance."""
    generator = np.random.default_rng(seed)

    def mixed(bits: ExpertBits | None) -> ExpertBits | None:
        if bits is None:
            return None
        neurons = generator.permutation([neuron for band in bits.bands for neuron in band.neurons]).tolist()
        bands = []
        for band in bits.bands:
            own, neurons = neurons[: len(band.neurons)], neurons[len(band.neurons) :]
            bands.append(replace(band, neurons=tuple(own)))
        return replace(bits, bands=tuple(bands))

    return replace(plan, layers={layer: tuple(map(mixed, bits)) for layer, bits in plan.layers.items()})


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
    """At a quarter of the bytes and at 15 % all uniform plans as small do more damage, at a quarter those of equal bits
    much more, and at 15 % those as large do more. By the loss the latter two hold; what most bits for the last matrices
    cost at a quarter is within its noise."""
    quarter, sixth = compare(name)
    for found in (quarter, sixth):
        print(*found.lines(), sep="\n")
        assert found.solved.share <= found.budget + 0.002
        assert found.solved.divergence < min(found.best_uniform(mixed=mixed).divergence for mixed in (False, True))
        assert found.solved.divergence < found.frontier()
    assert quarter.solved.divergence <= 0.65 * quarter.best_uniform(mixed=False).divergence
    assert quarter.solved.increase <= 0.65 * quarter.best_uniform(increase, mixed=False).increase
    assert sixth.solved.increase < sixth.frontier(increase)
