"""Packed codes in another width: bit by bit what packing them anew gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moec.codegen.onnx.graph import GraphBuilder
from moec.codegen.onnx.packed.rearrange import Packing, rearrange
from moec.codegen.onnx.targets import Target
from moec.ir import DType
from moec.quantization.packing import pack_bits, pack_trits, unpack_bits

ROWS = 3
PROFILE = Target.ORT_CPU.profile


@pytest.mark.parametrize("columns", [1, 13, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stored", [None, 1, 2, 3, 4, 5, 6, 7, 8], ids=lambda bits: "trits" if bits is None else None)
def test_codes_in_another_width(stored: int | None, bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    count = 3 if stored is None else 1 << stored
    codes = torch.randint(0, count, (ROWS, columns), generator=generator)
    packed = pack_trits(codes) if stored is None else pack_bits(codes, stored)
    # the integers' middle moved to that of the new width, or their lower bits; any table where no code is in two bytes
    table = (np.arange(count) + max(0, (1 << bits) - count) // 2) % (1 << bits)
    if stored in (None, 1, 2, 4, 8):
        table = torch.randint(0, 1 << bits, (count,), generator=generator).numpy()
    for nbytes in (-(-columns * bits // 8), columns * bits // 8 + 5):
        found = _run(packed, columns, Packing(stored), table, bits, nbytes)
        assert torch.equal(unpack_bits(found, bits, columns).long(), torch.from_numpy(table)[codes])


def _run(
    packed: torch.Tensor, columns: int, packing: Packing, table: np.ndarray, bits: int, nbytes: int
) -> torch.Tensor:
    b = GraphBuilder(PROFILE.opset)
    codes = b.input("codes", DType.U8, list(packed.shape))
    result = rearrange(b, codes, columns, packing, table, bits, nbytes)
    b.output(b.reshape(result, (ROWS, nbytes)), "y", DType.U8, [ROWS, nbytes])
    opsets = {"": PROFILE.opset}
    graph = ir.Graph(b.inputs, b.outputs, nodes=b.nodes, initializers=b.initializers, opset_imports=opsets, name="y")
    model = ir.to_proto(ir.Model(graph, ir_version=PROFILE.ir_version)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"codes": packed.numpy()})[0])
