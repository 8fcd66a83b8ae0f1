"""How codes lie in words of packed weights, and which formats are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.formats import code_matrix
from moec.codegen.triton.packing import CodedExpert, CodedProjection, pack_experts
from moec.codegen.triton.spec import Element
from moec.dialects.quant import Codebook, Integer, Span
from moec.errors import UnsupportedModelError
from moec.experts import Quantized
from moec.quantization.rounding import Target, round_matrix
from tests.codegen.triton_cases import PACKED_HIDDEN, packed_case
from tests.codegen.triton_layers import build


def test_four_codes_of_a_word_are_a_quarter_of_a_block_apart() -> None:
    matrix = torch.arange(256.0).reshape(1, 256).remainder(16) - 8
    coded = code_matrix(Quantized(round_matrix(Target(Integer(4)), matrix)), "")
    whole = CodedProjection(coded)
    packed = pack_experts([CodedExpert(256, None, whole, whole)], 256, Element.BFLOAT16)
    words = packed.tensors["input_int4"][:32].reshape(2, 16)
    codes = coded.values[0].reshape(2, 4, 16, 2).int()
    for plane in range(4):
        for half in range(2):
            assert torch.equal((words >> 16 * half + 4 * plane) & 15, codes[:, plane, :, half])


REFUSED = {
    "a table": (Codebook(4), "Codebook"),
    "groups of 8": (Integer(4, Span.GROUP, 8), "every 8 weights"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refuses_formats_without_a_kernel(name: str, tmp_path: Path) -> None:
    kind, reason = REFUSED[name]
    module = build([packed_case(name, kind)], PACKED_HIDDEN, tmp_path / "store")
    with pytest.raises(UnsupportedModelError, match=reason):
        emit_triton(module, tmp_path, element=Element.FLOAT32)
