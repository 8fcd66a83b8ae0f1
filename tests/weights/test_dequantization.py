"""fp8 blocks and MXFP4 against a direct computation, also part by part."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moec.errors import UsageError
from moec.weights.context import WeightContext


def _bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    # 0x7F and 0xFF are not a number; 0x7E is the largest magnitude
    return (_bytes(*shape, high=0x7F, seed=seed) | (_bytes(*shape, high=2, seed=seed + 1) << 7)).view(
        torch.float8_e4m3fn
    )


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (5, 7), (128, 130), (2, 130, 129)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_block_with_ragged_edges(shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    weight = _fp8(*shape)
    rows, columns = shape[-2:]
    grid = (*shape[:-2], -(-rows // 128), -(-columns // 128))
    scale = (torch.rand(grid, generator=torch.Generator().manual_seed(3)) + 0.1).to(scale_dtype)
    expanded = scale.float().repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    expected = weight.float() * expanded
    context = WeightContext(in_memory={"w": weight, "s": scale})
    text = "fp8_block(w, s, 128, 128)"
    assert context.shape_dtype(text) == (shape, torch.float32)
    assert torch.equal(context.load(text), expected)
    for index in (0, shape[0] - 1, slice(1, None), slice(0, None, 3), slice(shape[0] // 2, shape[0])):
        assert torch.equal(context.load(text, index), expected[index])
    turned = "transpose(fp8_block(w, s, 128, 128), 0, 1)"
    assert torch.equal(context.load(turned, slice(1, None, 2)), expected.transpose(0, 1)[1::2])


def test_fp8_with_power_of_two_scales() -> None:
    weight, exponents = _fp8(4, 4), torch.tensor([[120, 127], [130, 128]], dtype=torch.uint8)
    context = WeightContext(in_memory={"w": weight, "s": exponents.view(torch.float8_e8m0fnu)})
    factors = torch.exp2(exponents.float() - 127).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(context.load("fp8_block(w, s, 2, 2)"), weight.float() * factors)


@pytest.mark.parametrize("scale_shape", [(1, 2), (2, 1), (2,), (2, 2, 1), (3, 2)])
def test_fp8_scales_of_the_wrong_shape(scale_shape: tuple[int, ...]) -> None:
    context = WeightContext(in_memory={"w": _fp8(130, 130), "s": torch.ones(scale_shape)})
    with pytest.raises(UsageError, match="needs scales of shape"):
        context.load("fp8_block(w, s, 128, 128)")


def test_mxfp4_as_transformers_reads_it() -> None:
    blocks, scales = _bytes(3, 10, 4, 16), _bytes(3, 10, 4, low=100, high=140, seed=1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    context = WeightContext(in_memory={"b": blocks, "s": scales})
    assert context.shape_dtype("mxfp4(b, s)") == ((3, 128, 10), torch.float32)
    assert torch.equal(context.load("mxfp4(b, s)"), expected)
    for index in (0, 2, slice(1, 3), slice(0, 3, 2)):
        assert torch.equal(context.load("mxfp4(b, s)", index), expected[index])
    part = "slice(slice(mxfp4(b, s), 1, 37, 101, 3), 2, 2, 9, 2)"
    assert torch.equal(context.load(part), expected[:, 37:101:3, 2:9:2])


def test_mxfp4_values_of_every_nibble() -> None:
    blocks = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 1, 16) | 0x10
    context = WeightContext(in_memory={"b": blocks, "s": torch.full((1, 1, 1), 128, dtype=torch.uint8)})
    low = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = context.load("mxfp4(b, s)").reshape(16, 2)
    assert values[:, 0].tolist() == [2 * value for value in low] + [-2 * value for value in low]
    assert values[1, 1].item() == 1.0


def test_mxfp4_extreme_exponents() -> None:
    blocks = torch.full((1, 1, 3, 16), 0x12, dtype=torch.uint8)
    scales = torch.tensor([[[0, 127, 252]]], dtype=torch.uint8)
    values = WeightContext(in_memory={"b": blocks, "s": scales}).load("mxfp4(b, s)").reshape(3, 32)
    assert values[:, 0].tolist() == [2.0**-127, 1.0, 2.0**125]
    assert values[:, 1].tolist() == [2.0**-128, 0.5, 2.0**124]


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [((2, 4, 16), (2, 4)), ((2, 4, 2, 16), (2, 4)), ((2, 4, 2, 16), (2, 4, 3))],
)
def test_mxfp4_of_the_wrong_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    context = WeightContext(in_memory={"b": _bytes(*blocks), "s": _bytes(*scales)})
    with pytest.raises(UsageError, match="blocks"):
        context.load("mxfp4(b, s)")
