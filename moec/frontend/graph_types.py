"""Types, constants and arguments of a traced graph in terms of the IR."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moec.dialects import builtin
from moec.errors import UnsupportedModelError
from moec.frontend.sizes import SizeTranslator
from moec.ir import DenseConstant, DType, Location, TensorType

DTYPES = {
    torch.float64: DType.F64,
    torch.float32: DType.F32,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.complex64: DType.C64,
    torch.int64: DType.I64,
    torch.int32: DType.I32,
    torch.int16: DType.I16,
    torch.int8: DType.I8,
    torch.uint8: DType.U8,
    torch.bool: DType.I1,
}


def element_type(dtype: torch.dtype) -> DType:
    """The IR's name of an element type; raises UnsupportedModelError where it has none."""
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"tensors of {dtype} are not supported")
    return DTYPES[dtype]


def node_type(node: fx.Node, sizes: SizeTranslator) -> TensorType:
    """The type of a node that stands for one tensor."""
    return traced_type(node.meta["val"], sizes)


def traced_type(value: object, sizes: SizeTranslator) -> TensorType:
    """The type of a traced tensor; raises UnsupportedModelError for anything else."""
    if not isinstance(value, torch.Tensor):
        raise UnsupportedModelError(f"a {type(value).__name__} is used as a tensor")
    return TensorType(tuple(sizes(size) for size in value.shape), element_type(value.dtype))


def is_tensor_node(node: fx.Node) -> bool:
    """Whether a node stands for tensors, not for a size or another number."""
    value = node.meta.get("val")
    return not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """The given arguments of a call by their schema names, in schema order."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    return {name: given[name] for name in names if name in given}


def constant(held: torch.Tensor, kind: TensorType, location: Location) -> builtin.ConstantOp:
    """A constant operation of a real tensor."""
    data = torch.view_as_real(held) if held.is_complex() else held
    raw = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return builtin.ConstantOp(result_types=[kind], data=DenseConstant(raw), location=location)
