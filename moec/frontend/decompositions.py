"""Which operations a traced program is made of.

Starting from torch's own decompositions into core ATen, the operations below stay whole: each is one meaning that a
pattern or a backend wants to see. In-place forms, views that alias and every other composite are gone afterwards.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

_aten = torch.ops.aten

KEPT = (
    _aten.linear.default,
    _aten.matmul.default,
    _aten.silu.default,
    _aten.gelu.default,
    _aten.softplus.default,
    _aten.log_sigmoid_forward.default,
    _aten.hardtanh.default,
    _aten.leaky_relu.default,
    _aten.softmax.int,
    _aten.log_softmax.int,
    _aten.layer_norm.default,
    _aten.rms_norm.default,
    _aten.scaled_dot_product_attention.default,
    _aten.one_hot.default,
    _aten.einsum.default,
    _aten.conv1d.default,
    _aten.conv1d.padding,
)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The same program, functional, in core ATen operations and `KEPT`, without the checks of its inputs' sizes."""
    # They would be traced again as Python code, and each comparison in them become one more assumption.
    program._guards_code = []
    table = torch.export.default_decompositions()
    for operation in KEPT:
        table.pop(operation, None)  # type: ignore[no-untyped-call]
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed
