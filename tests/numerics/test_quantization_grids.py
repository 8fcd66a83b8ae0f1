"""Matrices in packed formats: against plain formulas, as near as a grid allows, and with input that breaks grids."""

from __future__ import annotations

from itertools import pairwise
from math import pi

import pytest
import torch

from moec.dialects.quant import (
    BlockFloat,
    BlockScale,
    Codebook,
    Element,
    Format,
    Integer,
    Levels,
    Span,
    Ternary,
    TritPacking,
    ZeroPoint,
)
from moec.errors import UnsafeInputError, UsageError
from moec.passes.quantizing.choices import FormatOptions, ZeroPoints
from moec.quantization.codebooks import normal_float_table
from moec.quantization.grids import GridSettings, TernaryFit
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix

FORMATS: dict[str, Target] = {
    f"int{bits}-{zero.value}-{span.value}": Target(Integer(bits, span, 16 if span is Span.GROUP else 0, zero))
    for bits in range(1, 9)
    for zero in ZeroPoint
    for span in Span
}
FORMATS["trits-extremes"] = Target(Ternary(Levels.EXTREMES))
FORMATS["trits-extremes-tensor"] = Target(Ternary(Levels.EXTREMES, Span.TENSOR, packing=TritPacking.FIVE_PER_BYTE))
FORMATS["trits-absmean"] = Target(Ternary(Levels.SCALE, Span.TENSOR), GridSettings(ternary=TernaryFit.ABSMEAN))
FORMATS["trits-symmetric"] = Target(
    Ternary(Levels.SCALE, Span.GROUP, 16, TritPacking.FIVE_PER_BYTE), GridSettings(ternary=TernaryFit.SYMMETRIC)
)
FORMATS["nf4"] = Target(Codebook(4, 1, Span.GROUP, 16), GridSettings(table=normal_float_table()))
FORMATS["kmeans"] = Target(Codebook(3, 1, Span.ROW))
FORMATS["vectors"] = Target(Codebook(6, 2, Span.TENSOR))
FORMATS["mxfp4"] = Target(BlockFloat(Element.E2M1, 32, BlockScale.E8M0))
FORMATS["mxfp8"] = Target(BlockFloat(Element.E4M3, 32, BlockScale.E8M0))
FORMATS["nvfp4"] = Target(BlockFloat(Element.E2M1, 16, BlockScale.E4M3))


def gaussian(rows: int = 12, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(packed: Packed, weight: torch.Tensor) -> float:
    return float((packed.dense(torch.float64) - weight).norm() / weight.norm())


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_on_the_grid_stays(name: str) -> None:
    """Packing what a packed matrix stands for, with its own scales, changes nothing; floats and doubles agree."""
    packed = round_matrix(FORMATS[name], gaussian())
    assert packed.problem() is None
    dense = packed.dense(torch.float64)
    assert dense.shape == (12, 64) and dense.isfinite().all()
    assert torch.allclose(packed.dense().double(), dense, rtol=1e-6, atol=1e-7)
    kind = packed.format
    if isinstance(kind, Integer) and kind.bits > 1:
        codes, scales = packed.integer_codes(), packed.scales.double()
        assert int(codes.max()) < 1 << kind.bits
        spread = scales if scales.shape[1] == 1 else scales.repeat_interleave(16, dim=1)
        assert bool(((dense - gaussian()).abs() <= spread * 0.51).all())


@pytest.mark.parametrize("zero", list(ZeroPoint))
@pytest.mark.parametrize("span", list(Span))
def test_more_bits_err_less(zero: ZeroPoint, span: Span) -> None:
    weight = gaussian()
    errors = [
        error(round_matrix(Target(Integer(bits, span, 16 if span is Span.GROUP else 0, zero)), weight), weight)
        for bits in range(2, 9)
    ]
    assert all(more < 0.7 * less for less, more in pairwise(errors))


def test_smaller_groups_err_less() -> None:
    weight = gaussian() * torch.logspace(-1, 1, 64, dtype=torch.float64)
    spans = [Integer(4, Span.TENSOR), Integer(4), Integer(4, Span.GROUP, 32), Integer(4, Span.GROUP, 8)]
    errors = [error(round_matrix(Target(span), weight), weight) for span in spans]
    assert errors == sorted(errors, reverse=True)


def test_a_search_never_errs_more() -> None:
    """By its own measure, the sum of |error|^2.4 in each group."""
    weight = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    values = weight.sample((8, 64)).double()
    kind = Integer(3, Span.GROUP, 16, ZeroPoint.INTEGER)
    plain, searched = (round_matrix(Target(kind, GridSettings(search=search)), values) for search in (False, True))

    def measure(packed: Packed) -> torch.Tensor:
        return (packed.dense(torch.float64) - values).abs().pow(2.4).reshape(8, 4, 16).sum(2)

    assert bool((measure(searched) <= measure(plain) * (1 + 1e-9)).all())
    assert float(measure(searched).sum()) < 0.97 * float(measure(plain).sum())


def test_integers_are_those_of_the_formula() -> None:
    """scale * (clip(round(w / scale) + zero) - zero) with scale = range / 15, group by group, in plain loops."""
    weight = gaussian(3, 32)
    packed = round_matrix(Target(Integer(4, Span.GROUP, 16, ZeroPoint.INTEGER)), weight)
    dense = packed.dense(torch.float64)
    for row in range(3):
        for group in range(2):
            values = weight[row, 16 * group : 16 * group + 16]
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            scale = float(torch.tensor((high - low) / 15, dtype=torch.float32))
            zero = round(-low / scale)
            for column, value in enumerate(values.tolist()):
                code = min(max(round(value / scale + zero), 0), 15)
                assert float(dense[row, 16 * group + column]) == pytest.approx(scale * (code - zero), rel=1e-12)


def test_trits_of_extremes_are_those_of_the_formula() -> None:
    weight = gaussian(5, 40)
    dense = round_matrix(Target(Ternary(Levels.EXTREMES)), weight).dense(torch.float64)
    for row, values in enumerate(weight):
        low, high = float(values.min().float()), float(values.max().float())
        wanted = [high if v > high / 2 else low if v < low / 2 else 0.0 for v in values.tolist()]
        assert dense[row].tolist() == wanted


def test_the_symmetric_scale_of_trits_is_the_best() -> None:
    """No scale of a fine grid, with its own nearest trits, has less squared error."""
    weight = gaussian(4, 33)
    settings = GridSettings(ternary=TernaryFit.SYMMETRIC)
    dense = round_matrix(Target(Ternary(Levels.SCALE), settings), weight).dense(torch.float64)
    for row, found in zip(weight, dense, strict=True):
        errors = []
        for scale in torch.linspace(0.01, 3, 600, dtype=torch.float64):
            trits = torch.where(row > scale / 2, 1.0, torch.where(row < -scale / 2, -1.0, 0.0))
            errors.append(float((trits * scale - row).square().sum()))
        assert float((found - row).square().sum()) <= min(errors) * (1 + 1e-6)


def test_absmean_trits_of_gaussian_weights_have_the_expected_zeros() -> None:
    """2 Phi(0.399) - 1 = 31 % of them (BitNet b1.58)."""
    settings = GridSettings(ternary=TernaryFit.ABSMEAN)
    packed = round_matrix(Target(Ternary(Levels.SCALE, Span.TENSOR), settings), gaussian(64, 256))
    assert float((packed.integer_codes() == 0).float().mean()) == pytest.approx(0.31, abs=0.01)


def test_nf4_is_the_published_table() -> None:
    """QLoRA, appendix E, to its own seven digits."""
    published = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    assert torch.allclose(normal_float_table()[:, 0], torch.tensor(published, dtype=torch.float64), atol=1e-6)


def test_tables_err_less_than_integers_of_equal_bits() -> None:
    weight = gaussian(32, 64)
    integers = error(round_matrix(Target(Integer(3)), weight), weight)
    assert error(round_matrix(Target(Codebook(3)), weight), weight) < 0.9 * integers


def test_mxfp4_scales_are_those_of_the_specification() -> None:
    """2^(floor(log2(largest)) - 2), and elements within half a step; saturated where above six."""
    weight = gaussian(4, 64)
    packed = round_matrix(FORMATS["mxfp4"], weight)
    for row in range(4):
        for block in range(2):
            largest = weight[row, 32 * block : 32 * block + 32].abs().max()
            assert int(packed.scales[row, block]) == int(torch.floor(torch.log2(largest))) - 2 + 127


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("scale", [0.0, 2.0**-90, 2.0**100])
def test_zero_tiny_and_huge_weights(name: str, scale: float) -> None:
    weight = gaussian(4, 64) * scale
    packed = round_matrix(FORMATS[name], weight)
    assert packed.problem() is None
    dense = packed.dense(torch.float64)
    assert dense.isfinite().all()
    if scale == 0:
        assert float(dense.abs().max()) <= 1e-37
    else:
        reference = round_matrix(FORMATS[name], gaussian(4, 64)).dense(torch.float64) * scale
        assert torch.allclose(dense, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int4-middle-group", "int2-integer-row", "trits-extremes", "nf4", "mxfp4", "nvfp4"])
def test_one_outlier_among_small_weights(name: str) -> None:
    weight = gaussian(4, 64)
    weight[1, 3] = 1e30
    packed = round_matrix(FORMATS[name], weight)
    assert packed.problem() is None
    dense = packed.dense(torch.float64)
    assert dense.isfinite().all()
    assert float(dense[1, 3]) == pytest.approx(1e30, rel=0.3)
    if not name.startswith("nvfp4"):
        assert bool((dense[[0, 2, 3]].abs().amax(1) > 1).all())


@pytest.mark.parametrize("options", [FormatOptions(bits=1), FormatOptions(bits=1, zero_points=ZeroPoints.FLOAT)])
def test_one_bit_keeps_the_signs(options: FormatOptions) -> None:
    """Levels of least squared error: of Gaussian weights 1 - 2 / pi of the squares are lost, and less is not possible.

    A zero point for numbers also follows weights that are not around zero, or all equal.
    """
    weight = gaussian(64, 512)
    packed = round_matrix(options.target(), weight)
    assert packed.problem() is None
    assert float((packed.dense(torch.float64) - weight).square().mean() / weight.square().mean()) < 1.02 * (1 - 2 / pi)
    assert torch.equal(packed.dense().sign()[weight.abs() > 1], weight.sign()[weight.abs() > 1].float())
    if options.zero_points is ZeroPoints.FLOAT:
        moved = round_matrix(options.target(), weight + 5).dense(torch.float64) - 5
        assert float((moved - weight).square().mean()) < 1.02 * (1 - 2 / pi)
        for equal in (0.0, 3.0, -0.25):
            found = round_matrix(options.target(), torch.full((2, 64), equal)).dense()
            assert torch.allclose(found, torch.full((2, 64), equal), rtol=2e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    weight = gaussian(4, 64)
    weight[2, 7] = value
    for name in ("int4-middle-group", "trits-extremes", "kmeans", "nvfp4"):
        with pytest.raises(UnsafeInputError, match="NaN or infinity"):
            round_matrix(FORMATS[name], weight, "some matrix")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Integer(4, Span.GROUP, 32), "groups of 32 do not divide rows of 50 weights"),
        (BlockFloat(), "blocks of 32 do not divide rows of 50 weights"),
        (Codebook(4, 4), "entries of 4 weights do not divide rows of 50"),
    ],
)
def test_groups_that_do_not_divide(kind: Format, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        round_matrix(Target(kind), gaussian(4, 50))


def test_odd_widths_fill_their_last_byte() -> None:
    weight = gaussian(3, 37)
    for bits in range(1, 9):
        packed = round_matrix(Target(Integer(bits, zero_point=ZeroPoint.INTEGER)), weight)
        assert packed.codes.shape == (3, -(-37 * bits // 8))
        assert packed.dense().shape == (3, 37)


def test_a_scale_that_half_precision_cannot_hold() -> None:
    settings = GridSettings(scale_dtype=torch.float16)
    with pytest.raises(UsageError, match="does not fit its type"):
        round_matrix(Target(Integer(4), settings), gaussian(2, 32) * 1e7)


@pytest.mark.parametrize("name", ["int4-float-group", "int1-middle-row", "trits-symmetric", "kmeans"])
def test_gradients_reach_scales(name: str) -> None:
    packed = round_matrix(FORMATS[name], gaussian())
    scales = packed.scales.clone().requires_grad_()
    changed = Packed(packed.format, 64, packed.codes, scales, packed.zero_points, packed.table)
    (gradient,) = torch.autograd.grad(changed.dense().square().sum(), scales)
    assert bool((gradient > 0).all())


def test_damaged_numbers_are_found() -> None:
    packed = round_matrix(FORMATS["int4-middle-row"], gaussian())
    for value, message in ((0.0, "not positive"), (float("nan"), "not finite")):
        scales = packed.scales.clone()
        scales[3] = value
        assert message in str(Packed(packed.format, 64, packed.codes, scales).problem())
    book = round_matrix(FORMATS["kmeans"], gaussian())
    assert book.table is not None
    flipped = Packed(book.format, 64, book.codes, book.scales, table=book.table.flip(0))
    assert "do not ascend" in str(flipped.problem())
    trits = round_matrix(FORMATS["trits-extremes"], gaussian())
    assert "no trit" in str(Packed(trits.format, 64, torch.full_like(trits.codes, 255), trits.scales).problem())
    assert "above zero" in str(Packed(trits.format, 64, trits.codes, trits.scales.flip(1)).problem())
    blocks = round_matrix(FORMATS["mxfp4"], gaussian())
    assert "not finite" in str(Packed(blocks.format, 64, blocks.codes, torch.full_like(blocks.scales, 255)).problem())
