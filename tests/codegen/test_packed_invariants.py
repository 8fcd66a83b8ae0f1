"""What packed weights must obey: the invariants Q1 to Q12 of their types, each by its number.

Damaged streams of dictionaries, rules of the text form and formats of each lowering have tests of their own beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from moec.artifact.options import Activations
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import MODEL_FILE
from moec.codegen.onnx.targets import Target as OnnxTarget
from moec.dialects.moe import ExpertsOp, Normalize, Routing
from moec.dialects.quant import (
    BlockFloat,
    Codebook,
    DequantOp,
    Format,
    Integer,
    Levels,
    Span,
    Ternary,
    TernaryDictionary,
    ZeroPoint,
)
from moec.errors import UsageError, VerificationError
from moec.ir import VerifyError, verify
from moec.module import Module
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target, round_matrix
from tests.codegen.packed_matrices import FORMATS, expert, experts_module, linear_module, random_packed
from tests.codegen.running import assert_close, emit_and_run, module_of, reference

HIDDEN, WIDTH = 64, 32
_FUSED = {Activations.FLOAT32: (4,), Activations.INT8: (2, 4, 8)}
"""Bits that the fused operator multiplies with activations of a type."""
GROUPED = Integer(4, Span.GROUP, 32, ZeroPoint.INTEGER)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(kind: Format, rows: int = 4, columns: int = HIDDEN) -> Packed:
    return random_packed(kind, rows, columns, generator())


@pytest.mark.parametrize("kind", [GROUPED, Codebook(4, 1, Span.GROUP, 32), BlockFloat()], ids=["int", "table", "mxfp4"])
def test_q1_groups_divide_rows(kind: Format) -> None:
    with pytest.raises(UsageError, match=r"do(es)? not divide"):
        round_matrix(Target(kind), torch.ones(2, 48))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 24, 33])
def test_q2_rows_of_codes_fill_whole_bytes(bits: int, columns: int) -> None:
    packed = made(Integer(bits), 3, columns)
    assert packed.codes.shape == (3, -(-columns * bits // 8))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_q3_scales_are_positive_and_finite(value: float) -> None:
    packed = made(GROUPED)
    packed.require("a matrix")
    scales = packed.scales.clone()
    scales[1, 1] = value
    with pytest.raises(VerificationError, match=r"a scale is not (positive|finite)"):
        replace(packed, scales=scales).require("a matrix")


@pytest.mark.parametrize("bits", range(1, 9))
def test_q4_zero_points_are_codes(bits: int) -> None:
    """They are stored in as many bits, so that none can be out of range, and zero is on every grid."""
    weight = torch.tensor([[3.0, 4.0, 5.0, 6.0], [-6.0, -5.0, -4.0, -3.0], [-1.0, 0.0, 0.0, 2.0]])
    packed = round_matrix(Target(Integer(bits, zero_point=ZeroPoint.INTEGER)), weight)
    assert packed.zero_points is not None and packed.zero_points.shape == (3, 1)
    assert int(packed.zero_points.max()) < 1 << bits
    assert float(packed.dense()[2, 1].abs()) == 0


def test_q5_extremes_hold_zero_between_them() -> None:
    packed = round_matrix(Target(Ternary(Levels.EXTREMES)), torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    assert bool((packed.scales[:, 0] <= 0).all() and (packed.scales[:, 1] >= 0).all())
    assert packed.scales[1].tolist() == [-1, 1] and not bool(packed.integer_codes()[1].any())
    assert "above zero" in str(replace(packed, scales=packed.scales.flip(1)).problem())


def test_q6_codebooks_ascend_without_equal_entries() -> None:
    packed = made(Codebook(4))
    assert packed.problem() is None and packed.table is not None
    for table in (packed.table.flip(0), packed.table[[0, 0, *range(2, 16)]]):
        assert "do not ascend" in str(replace(packed, table=table).problem())


def test_q7_no_block_has_the_scale_that_is_no_number() -> None:
    packed = made(BlockFloat())
    scales = packed.scales.clone()
    scales[2, 1] = 255
    assert packed.problem() is None and "not finite" in str(replace(packed, scales=scales).problem())
    assert int(round_matrix(Target(BlockFloat()), torch.full((1, 32), 3e38)).scales.max()) < 255


def _offsets_that_fall(packed: Packed) -> Packed:
    assert packed.offsets is not None
    return replace(packed, offsets=packed.offsets.flip(0))


def _offsets_from_one(packed: Packed) -> Packed:
    assert packed.offsets is not None
    return replace(packed, offsets=packed.offsets + 1)


def _rows_that_are_short(packed: Packed) -> Packed:
    return replace(packed, columns=packed.columns + 2)


@pytest.mark.parametrize("damage", [_offsets_that_fall, _offsets_from_one, _rows_that_are_short])
def test_q8_streams_of_a_dictionary(damage: Callable[[Packed], Packed]) -> None:
    packed = made(TernaryDictionary(10))
    assert packed.problem() is None
    assert damage(packed).problem() is not None


def _layer(*classes: tuple[Format, int]) -> tuple[ExpertsOp, Module]:
    members = [[expert([kind] * 3, HIDDEN, WIDTH, generator()) for _ in range(count)] for kind, count in classes]
    module = module_of(*experts_module(members, HIDDEN, routing=Routing(k=1, normalize=Normalize.SUM)))
    (layer,) = (op for op in module.op.walk() if isinstance(op, ExpertsOp))
    return layer, module


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (((0, 0), (2,)), "each stored expert once"),
        (((0, 3), (2,)), "each stored expert once"),
        (((0,), (2,)), "each stored expert once"),
        (((0,), (1, 2)), "does not hold 1 experts"),
    ],
)
def test_q9_classes_hold_each_expert_in_one_slot(experts: tuple[tuple[int, ...], ...], message: str) -> None:
    layer, module = _layer((GROUPED, 2), (Integer(8), 1))
    verify(module.op)
    layer.classes = tuple(replace(kind, experts=own) for kind, own in zip(layer.classes, experts, strict=True))
    with pytest.raises(VerifyError, match=message):
        verify(module.op)


@pytest.mark.parametrize("other", [Integer(4), Integer(8, zero_point=ZeroPoint.INTEGER), Ternary()])
def test_q10_who_shares_a_weight_reads_it_as_one_type(other: Format) -> None:
    module, _ = linear_module(made(Integer(8), 8, 8))
    (op,) = (op for op in module.walk() if isinstance(op, DequantOp))
    op.format = other
    with pytest.raises(VerifyError):
        verify(module)


def _fused_bits(module: Module, folder: Path, activations: Activations) -> list[int]:
    feeds = {"x": torch.randn((2, HIDDEN), generator=generator())}
    options = {"target": OnnxTarget.ORT_CPU, "lowering": Lowering.FUSED, "activations": activations}
    found, _ = emit_and_run(module, feeds, folder, **options)
    assert_close(found["y"], reference(module, feeds)["y"], 1e-5 if activations is Activations.FLOAT32 else 2e-2)
    nodes = onnx.load(folder / MODEL_FILE, load_external_data=False).graph.node
    return [item.i for node in nodes if node.op_type == "QMoE" for item in node.attribute if "bits" in item.name]


@pytest.mark.parametrize("activations", list(Activations), ids=lambda value: value.value)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_q11_the_fused_operator_gets_one_class_of_bits_that_it_knows(
    bits: int, activations: Activations, tmp_path: Path
) -> None:
    kind, other = Integer(bits, Span.GROUP, 32), Integer(bits, Span.GROUP, 16)
    fused = [bits] if bits in _FUSED[activations] else []
    assert _fused_bits(_layer((kind, 3))[1], tmp_path / "one", activations) == fused
    assert _fused_bits(_layer((kind, 2), (other, 1))[1], tmp_path / "two", activations) == []


def test_q12_stored_bytes_are_those_of_all_parts() -> None:
    for kind in FORMATS.values():
        packed = made(kind, 4, 96 if "48" in str(kind) else HIDDEN)
        assert packed.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())
