"""merge-models: means, task vectors that reproduce each model, and coefficients that a fit makes better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moec
from moec.calibration.data import read_data
from moec.dialects.builtin import WeightOp
from moec.errors import UsageError
from moec.module import Module
from moec.passes.model_merging.fitting import CoefficientFit, FitSettings
from moec.passes.model_merging.task_vectors import MergedWeight, layer_name, layer_names, merged
from tests.experts.models import difference, output
from tests.frontend.tiny_models import VOCABULARY_SIZE
from tests.numerics.several_models import changed, several


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return several("llama", tmp_path_factory.mktemp("models"), equal=False)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (4, 16)))
    return path


def tensors(module: Module) -> dict[str, torch.Tensor]:
    return {op.weight_name: module.weights.load(op.source) for op in module.op.walk() if isinstance(op, WeightOp)}


def of_model(module: Module, number: int) -> dict[str, torch.Tensor]:
    """The weights of one of the models beside the first, by the names of the first."""
    return {
        op.weight_name: module.weights.load(f"with.{number}/{op.source}")
        for op in module.op.walk()
        if isinstance(op, WeightOp)
    }


@pytest.mark.parametrize("number", [1, 2])
def test_one_coefficient_of_one_is_that_model(models: Module, number: int) -> None:
    coefficients = ",".join("1" if place == number else "0" for place in (1, 2))
    found = tensors(changed(models, f"merge-models{{method=task-vectors coefficients={coefficients}}}"))
    wanted = of_model(models, number)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_zeros_are_the_first_model_and_the_rest_is_the_formula(models: Module) -> None:
    zeros = changed(models, "merge-models{method=task-vectors coefficients=0}")
    assert zeros.print() == models.print()
    found = tensors(changed(models, "merge-models{method=task-vectors coefficients=0.25,-0.5}"))
    base, one, two = tensors(models), of_model(models, 1), of_model(models, 2)
    for name, tensor in found.items():
        wanted = base[name] + 0.25 * (one[name] - base[name]) - 0.5 * (two[name] - base[name])
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_the_average_of_equal_models_is_the_model_and_of_others_the_mean(models: Module, tmp_path: Path) -> None:
    equal = several("llama", tmp_path, equal=True)
    assert changed(equal, "merge-models{method=average}").print() == equal.print()
    assert changed(equal, "merge-models{method=task-vectors coefficients=0.3}").print() == equal.print()
    found = tensors(changed(models, "merge-models{method=average}"))
    base, one, two = tensors(models), of_model(models, 1), of_model(models, 2)
    assert all(torch.equal(found[name], (base[name] + one[name] + two[name]) / 3) for name in found)


def test_pieces_have_coefficients_of_their_own(models: Module, ids: Path) -> None:
    base, one = torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3)
    assert torch.equal(merged(base, [one], torch.tensor([[1.0, 0.0]])), torch.tensor([[0.0, 0, 0], [3, 4, 5]]))
    assert torch.equal(merged(base[:1], [one[:1]], torch.tensor([[0.0, 0, 0, 0, 1]])), base[:1])
    options = "sequences=2 length=16 steps=0 start=0.2"
    plain = output(changed(models, "merge-models{method=task-vectors coefficients=0.2}"))
    for pieces in (1, 3):
        fitted = changed(models, f"merge-models{{{options} pieces={pieces}}}", calibration=ids)
        assert difference(plain, output(fitted)) < 1e-5


def test_the_fit_lowers_its_objective_and_comes_nearer_to_the_models(models: Module, ids: Path) -> None:
    ends = []
    for steps in (0, 2, 8):
        module = changed(models, "canonicalize")
        options = f"sequences=4 length=16 penalty=0 rate=0.3 steps={steps}"
        report = moec.run_passes(module, f"merge-models{{{options}}}", calibration=ids)
        text = str(report.records[0].remarks[0])
        before, after = (float(word) for word in text.partition("goes from ")[2].split(" to "))
        assert after <= before
        ends.append(after)
    assert ends[2] < ends[1] < 0.95 * ends[0]


def test_the_slope_from_weights_is_that_through_the_coefficients(models: Module, ids: Path) -> None:
    data = read_data(models, texts=(), tokens=ids, sequences=2, length=16, seed=0)
    found = [MergedWeight(op, layer_name(op.weight_name), (op.source, f"with.1/{op.source}"))
             for op in models.op.walk() if isinstance(op, WeightOp)]  # fmt: skip
    layers = layer_names(models.op)
    settings = FitSettings(0.2, 2, 0, 0.1, 0.0, 1.0, 2)
    fit = CoefficientFit(models, found, layers, [data])
    (target,) = fit._targets(0, data, 2)
    start = torch.full((len(layers), 1, 2), 0.2)
    model = fit._merged(start)
    fit._loss(target, model, settings).backward()  # type: ignore[no-untyped-call]
    slope = fit._slope(start, model)
    # all weights at once, as a model that fits into memory several times could have it
    coefficients = start.clone().requires_grad_()
    whole = {}
    for weight in found:
        base, other = fit._tensors(weight)
        whole[weight.op.weight_name] = merged(base, [other], coefficients[layers.index(weight.layer)])
    fit._loss(target, whole, settings).backward()  # type: ignore[no-untyped-call]
    assert coefficients.grad is not None and torch.allclose(slope, coefficients.grad, atol=1e-6)
    assert float(slope.abs().max()) > 1e-3


def test_equal_inputs_give_equal_models(models: Module, ids: Path) -> None:
    options = "merge-models{sequences=2 length=16 steps=2 pieces=2}"
    assert changed(models, options, calibration=ids).print() == changed(models, options, calibration=ids).print()


def test_what_does_not_fit_is_refused(models: Module, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 coefficients do not fit 2 models"):
        changed(models, "merge-models{method=task-vectors coefficients=1,2,3}")
    with pytest.raises(UsageError, match="1 texts do not fit 2 models"):
        changed(models, f"merge-models{{texts={tmp_path / 'a.txt'}}}")
