"""`encode-ternary`: no loss, the rates of the codec, and the smallest packing of each layer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moec.api import run_passes
from moec.artifact.summary import model_size
from moec.dialects.builtin import WeightOp
from moec.dialects.quant import Levels, Span, Ternary, TernaryDictionary, TritPacking
from moec.experts import (
    FeedForward,
    Projection,
    Quantized,
    find_moe_layers,
    load_expert,
    replace_experts,
    slice_experts,
)
from moec.ir import DType
from moec.module import Module
from moec.quantization.dictionary import build_dictionary
from moec.quantization.grids import GridSettings
from moec.quantization.packed import Packed, pack_codes
from moec.quantization.rounding import Target, round_matrix
from moec.quantization.trits import encoded, padded, repacked
from tests.experts.models import copy_of, output, raised_model


def random_trits(
    rows: int, columns: int, share: float, seed: int = 0, *, levels: torch.dtype = torch.float32
) -> Packed:
    """A ternary matrix with levels of its rows; trits are zero with probability `share`."""
    other = (1 - share) / 2
    trits = np.random.default_rng(seed).choice(3, size=(rows, columns), p=[share, other, other]).astype(np.uint8)
    kind = Ternary(Levels.EXTREMES)
    scales = torch.tensor([-1.5, 2.0]).repeat(rows, 1) * torch.arange(1, rows + 1)[:, None]
    return Packed(kind, columns, pack_codes(kind, torch.from_numpy(trits)), scales.to(levels))


def entropy(share: float) -> float:
    other = (1 - share) / 2
    return -share * math.log2(share) - 2 * other * math.log2(other)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.885, 0.98])
@pytest.mark.parametrize("columns", [1, 64, 333])
def test_streams_stand_for_the_same_numbers(share: float, columns: int) -> None:
    packed = random_trits(5, columns, share)
    dictionary = build_dictionary(12, share)
    stream = encoded(packed, dictionary, dictionary.table())
    for found in (stream, padded(stream, len(stream.codes) + 7), repacked(packed, TritPacking.FIVE_PER_BYTE)):
        assert found.problem() is None and found.shape == packed.shape
        assert torch.equal(found.dense(), packed.dense())


def test_the_published_ratio() -> None:
    """768 x 3072 random trits of which 88.5 % are zero, levels in half precision: 21 times less than bfloat16."""
    packed = random_trits(768, 3072, 0.885, levels=torch.bfloat16)
    dictionary = build_dictionary(16, 0.885)
    stream = encoded(packed, dictionary, dictionary.table())
    weights = 768 * 3072
    code_bits = 8 * len(stream.codes) / weights
    assert code_bits == pytest.approx(0.737, rel=0.01)
    size = stream.codes.nbytes + stream.scales.nbytes + stream.offsets.nbytes  # type: ignore[union-attr]
    assert 2 * weights / size > 21
    assert entropy(0.885) < code_bits
    assert torch.equal(stream.integer_codes(), packed.integer_codes())


def test_rates_fall_with_the_share_of_zeros_and_stay_above_entropy() -> None:
    rates = []
    for share in (0.5, 0.7, 0.885, 0.95, 0.98):
        dictionary = build_dictionary(12, share)
        stream = encoded(random_trits(64, 2048, share), dictionary, dictionary.table())
        rates.append(8 * len(stream.codes) / (64 * 2048))
        # 14 pairs at most in 12 bits
        assert rates[-1] >= max(entropy(share), 12 / 28)
    assert rates == sorted(rates, reverse=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Module:
    return raised_model("mixtral", tmp_path_factory.mktemp("model"))


def projections(expert: FeedForward) -> tuple[Projection, Projection, Projection]:
    assert expert.gate is not None
    return expert.gate, expert.up, expert.down


def ternary_experts(source: Module, share: float | None) -> Module:
    """The model with ternary experts: random trits with a share of zeros, or those of its own weights."""
    module = copy_of(source)
    for layer in find_moe_layers(module.op):
        new = {}
        for number in range(layer.expert_count):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward)

            def change(item: Projection, seed: int) -> Projection:
                if share is None:
                    packed = round_matrix(Target(Ternary(Levels.EXTREMES), GridSettings()), item.dense())
                else:
                    packed = random_trits(*item.matrix.shape, share, seed)
                return replace(item, matrix=Quantized(packed))

            # no two matrices are equal, or they would be stored once
            first = 1000 * layer.index + 3 * number
            gate, up, down = (change(item, first + side) for side, item in enumerate(projections(expert)))
            new[number] = replace(expert, gate=gate, up=up, down=down)
        replace_experts(layer, module.weights, new)
    return module


def test_a_model_with_streams_computes_the_same(source: Module) -> None:
    module = ternary_experts(source, 0.97)
    before = model_size(module)
    wanted = output(module)
    report = run_passes(module, "encode-ternary{code-bits=8}")
    statistics = report.records[0].statistics
    layers = find_moe_layers(module.op)
    assert statistics["streams"] == 3 * sum(layer.expert_count for layer in layers)
    assert torch.equal(output(module), wanted)
    after = model_size(module)
    assert after.parameters == before.parameters
    assert after.bytes - before.bytes == statistics["after"] - statistics["before"] < 0
    # one table for the model
    tables = [op for op in module.op.walk() if isinstance(op, WeightOp) and op.weight_name.endswith(".table")]
    assert len(tables) == 1
    for layer in layers:
        assert len(layer.experts.classes) == 1 and layer.experts.classes[0].shared >= 1
    layer = slice_experts(layers[0], [1, 2, 5])
    expert = load_expert(layer, module.weights, 1)
    assert isinstance(expert, FeedForward) and isinstance(expert.up.matrix, Quantized)
    assert isinstance(expert.up.matrix.packed.format, TernaryDictionary)
    wanted_trits = random_trits(*expert.up.matrix.shape, 0.97, 3 * 2 + 1).integer_codes()
    assert torch.equal(expert.up.matrix.packed.integer_codes(), wanted_trits)


def test_narrow_rows_are_packed_five_in_a_byte(source: Module) -> None:
    """A dictionary for rows of 64 Gaussian weights, of which three quarters are zero, saves less than its table."""
    module = ternary_experts(source, None)
    wanted = output(module)
    report = run_passes(module, "encode-ternary")
    statistics = report.records[0].statistics
    assert statistics.get("streams", 0) == 0 and statistics["packed"] > 0
    assert statistics["after"] < statistics["before"]
    assert torch.equal(output(module), wanted)
    again = run_passes(module, "encode-ternary").records[0].statistics
    assert again.get("packed", 0) == 0 and again["after"] == again["before"]


def test_each_side_gets_its_smallest_packing(source: Module) -> None:
    """Streams where zeros are many, five trits in a byte where they are few, in one model."""
    module = ternary_experts(source, 0.97)
    for layer in find_moe_layers(module.op):
        new = {}
        for number in range(layer.expert_count):
            expert = load_expert(layer, module.weights, number)
            assert isinstance(expert, FeedForward)
            dense = random_trits(*expert.down.matrix.shape, 0.4, 5000 + 100 * layer.index + number)
            new[number] = replace(expert, down=replace(expert.down, matrix=Quantized(dense)))
        replace_experts(layer, module.weights, new)
    wanted = output(module)
    run_passes(module, "encode-ternary{code-bits=8 zero-share=0.97}")
    assert torch.equal(output(module), wanted)
    expert = load_expert(find_moe_layers(module.op)[0], module.weights, 0)
    assert isinstance(expert, FeedForward)
    up, down = expert.up.matrix, expert.down.matrix
    assert isinstance(up, Quantized) and isinstance(up.packed.format, TernaryDictionary)
    assert isinstance(down, Quantized) and isinstance(down.packed.format, Ternary)
    assert down.packed.format.packing is TritPacking.FIVE_PER_BYTE


def test_models_without_trits_stay(source: Module) -> None:
    module = copy_of(source)
    report = run_passes(module, "encode-ternary,quantize{bits=4 group=16},encode-ternary")
    assert [record.statistics.get("streams", 0) for record in report.records] == [0, 0, 0]
    assert any("no expert has a ternary matrix" in remark.text for remark in report.records[0].remarks)


def test_groups_of_trits_stay(source: Module) -> None:
    module = copy_of(source)
    report = run_passes(module, "quantize{kind=ternary ternary=symmetric group=16},encode-ternary")
    assert report.records[1].statistics.get("weights", 0) == 0
    kinds = {op.value.type.dtype for op in module.op.walk() if isinstance(op, WeightOp)}  # type: ignore[attr-defined]
    assert DType.U8 in kinds and DType.I32 not in kinds
    assert Ternary(Levels.SCALE, Span.GROUP, 16).problem(64) is None
