"""`sparsify-delta`: what stays of differences, the base, rates of the codec, and experts that came from one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moec.api import run_passes
from moec.artifact.expert_facts import class_facts
from moec.artifact.summary import model_size
from moec.errors import UnsafeInputError, UsageError
from moec.experts import (
    Dense,
    Expert,
    FeedForward,
    Offset,
    Quantized,
    find_moe_layers,
    load_expert,
    permute_experts,
    protect_experts,
    replace_experts,
    slice_experts,
)
from moec.ir import parse_module, print_operation
from moec.module import Module
from moec.passes.delta_coding.fit import fit_signs
from moec.passes.delta_coding.signs import largest_signs, least_squares_scale, packed_signs
from moec.passes.factoring.sides import Side, dense_matrix, projection, with_matrices
from moec.quantization.dictionary import build_dictionary
from moec.quantization.trits import encoded
from tests.experts.models import calibrate_text, copy_of, difference, output, raised_model


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loaders(matrices: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    return [lambda matrix=matrix: matrix for matrix in matrices]  # type: ignore[misc]


def test_the_largest_entries_stay_with_their_signs() -> None:
    entries = torch.tensor([[1.0, -3.0, 2.0], [-2.0, 0.5, 2.0]])
    assert largest_signs(entries, 0.5).tolist() == [[0, -1, 1], [-1, 0, 0]]
    assert int((largest_signs(gaussian(7, 11), 0.3) != 0).sum()) == math.ceil(0.3 * 77)
    assert not largest_signs(torch.zeros(2, 2), 1.0).any()


def test_all_signs_have_the_error_of_the_formula() -> None:
    """With every entry kept the least error is |t|^2 - |t|_1^2 / n, and no other scale has less."""
    entries = gaussian(24, 40).double()
    signs = largest_signs(entries, 1.0)
    scale = least_squares_scale(entries, signs)
    wanted = float(entries.square().sum() - entries.abs().sum() ** 2 / entries.numel())
    assert float((entries - scale * signs).square().sum()) == pytest.approx(wanted, rel=1e-12)
    for other in (0.99 * scale, 1.01 * scale):
        assert float((entries - other * signs).square().sum()) > wanted


@pytest.mark.parametrize(("density", "code_bits", "above"), [(0.05, 8, 1.45), (0.1, 12, 1.25), (0.2, 12, 1.25)])
def test_streams_come_near_the_entropy_of_signs(density: float, code_bits: int, above: float) -> None:
    entries = gaussian(64, 2048, seed=3)
    signs = largest_signs(entries, density)
    packed = packed_signs(signs, 0.25)
    assert packed.problem() is None and torch.equal(packed.dense(), 0.25 * signs.float())
    dictionary = build_dictionary(code_bits, 1 - density)
    stream = encoded(packed, dictionary, dictionary.table())
    assert torch.equal(stream.dense(), packed.dense())
    entropy = -density * math.log2(density / 2) - (1 - density) * math.log2(1 - density)
    assert entropy < 8 * stream.codes.nbytes / entries.numel() < above * entropy


def test_further_bases_do_not_raise_the_error() -> None:
    base = gaussian(20, 32)
    matrices = [base + 0.3 * gaussian(20, 32, seed=seed) ** 3 for seed in range(1, 5)]
    errors = []
    for rounds in (1, 2, 4):
        coded = fit_signs(loaders(matrices), [1.0] * 4, 0.2, rounds, Dense)
        left = [
            matrix - coded.base.dense() - scale * signs
            for matrix, signs, scale in zip(matrices, coded.signs, coded.scales, strict=True)
        ]
        errors.append(sum(float(part.double().square().sum()) for part in left))
    assert errors[0] > errors[1] >= errors[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """A model whose experts are one expert with a twentieth of the weights changed."""
    folder = tmp_path_factory.mktemp("model")
    module = raised_model("mixtral", folder)
    for layer in find_moe_layers(module.op):
        first = load_expert(layer, module.weights, 0)
        assert isinstance(first, FeedForward)
        replace_experts(layer, module.weights, {n: changed(first, n) for n in range(layer.expert_count)})
    run_passes(module, calibrate_text(folder))
    return module


def changed(expert: FeedForward, seed: int) -> Expert:
    def more(weight: torch.Tensor) -> torch.Tensor:
        chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.05
        return weight + 0.1 * weight.std() * chosen * gaussian(*weight.shape, seed=seed).sign()

    sides = {side: Dense(more(dense_matrix(expert, side))) for side in Side}
    return with_matrices(expert, dict(sides))


def coded(source: Module, options: str) -> Module:
    module = copy_of(source)
    run_passes(module, f"sparsify-delta{{{options}}}")
    return module


def test_experts_with_sparse_differences_stay_nearly_what_they_were(source: Module) -> None:
    """Twice as many entries as changed, so that what the mean blurs fits, too; the whole shrinks several times."""
    module = coded(source, "density=0.1")
    want = output(source)
    found = difference(want, output(module))
    assert found < 0.05
    assert difference(want, output(coded(source, "density=0.005 rounds=1"))) > 1.5 * found
    text = print_operation(module.op)
    assert print_operation(parse_module(text)) == text
    for layer in find_moe_layers(module.op):
        assert len(layer.experts.classes) == 1 and layer.experts.classes[0].shared == 3
        (facts,) = class_facts(module, layer.experts)
        weights = 3 * layer.hidden_size * facts.width
        assert " on a shared base in ternary, 1." in facts.body
        assert facts.shared_bytes == 4 * weights and facts.bytes_per_expert < weights / 4
    assert model_size(module).bytes < 0.7 * model_size(source).bytes


def test_signs_and_bases_are_read_back(source: Module) -> None:
    module = coded(source, "density=0.1 base-bits=8 group=16")
    layer = find_moe_layers(module.op)[0]
    assert layer.experts.classes[0].shared == 9
    before = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
    for expert in before:
        assert isinstance(expert, FeedForward)
        matrix = expert.up.matrix
        assert isinstance(matrix, Offset) and isinstance(matrix.base, Quantized)
        signs = matrix.delta.packed.integer_codes()
        assert int((signs != 0).sum()) == math.ceil(0.1 * signs.numel())
    replace_experts(layer, module.weights, {2: before[2], 5: before[5]})
    layer = find_moe_layers(module.op)[0]
    assert len(layer.experts.classes) == 1
    whole = output(module)
    assert difference(whole, output(module)) == 0
    permuted = permute_experts(layer, [7, 6, 5, 4, 3, 2, 1, 0])
    assert difference(whole, output(module)) < 1e-12
    slice_experts(permuted, [0, 2, 4, 6])
    assert output(module).isfinite().all()


def test_streams_of_signs_change_nothing(source: Module) -> None:
    module = coded(source, "density=0.02 rounds=1")
    before = output(module)
    report = run_passes(module, "encode-ternary{code-bits=8}")
    assert report.records[0].statistics["streams"] > 0
    assert torch.equal(before, output(module))
    layer = find_moe_layers(module.op)[0]
    expert = load_expert(layer, module.weights, 3)
    assert isinstance(expert, FeedForward) and isinstance(expert.down.matrix, Offset)
    assert expert.down.matrix.delta.table_is_shared and layer.experts.classes[0].shared == 6


def test_searched_scales_err_less_on_what_experts_give(source: Module) -> None:
    """The multiples hold a poor and a good one, and the good one is taken."""
    module = coded(source, "density=0.1 rounds=1 scale=search multiples=0.1,3,20")
    poor = coded(source, "density=0.1 rounds=1 scale=search base=frequency multiples=20")
    want = output(source)
    assert difference(want, output(module)) < difference(want, output(poor))


def test_what_stays(source: Module) -> None:
    module = copy_of(source)
    layer = find_moe_layers(module.op)[0]
    protect_experts(layer, [1])
    kept = load_expert(layer, module.weights, 3)
    assert isinstance(kept, FeedForward)
    run_passes(module, "quantize{bits=4 group=16}")
    report = run_passes(module, "sparsify-delta")
    assert report.records[0].statistics.get("experts", 0) == 0
    assert any("other than dense matrices" in refusal.reason for refusal in report.records[0].refusals)
    mixed = copy_of(source)
    layer = find_moe_layers(mixed.op)[0]
    protect_experts(layer, [1])
    run_passes(mixed, "sparsify-delta{rounds=1}")
    one = load_expert(find_moe_layers(mixed.op)[0], mixed.weights, 1)
    assert isinstance(one, FeedForward) and isinstance(projection(one, Side.UP).matrix, Dense)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="groups of 24 do not divide"):
        coded(source, "base-bits=4 group=24")
    broken = copy_of(source)
    layer = find_moe_layers(broken.op)[0]
    expert = load_expert(layer, broken.weights, 1)
    assert isinstance(expert, FeedForward)
    infinite = dense_matrix(expert, Side.DOWN).clone()
    infinite[0, 0] = torch.inf
    replace_experts(layer, broken.weights, {1: with_matrices(expert, {Side.DOWN: Dense(infinite)})})
    with pytest.raises(UnsafeInputError, match="NaN or infinity") as caught:
        run_passes(broken, "sparsify-delta")
    assert "expert 1, down" in caught.value.where
