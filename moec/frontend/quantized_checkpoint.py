"""Checkpoints whose weights are published in low precision: each packed weight and its scales become one expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from moec.errors import UnsupportedModelError
from moec.frontend.symbolic_tensor import SymbolicTensor
from moec.weights.checkpoint import Checkpoint
from moec.weights.expression import Expression, Fp8Block, Mxfp4, Reference

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_SUFFIX = "_scale_inv"
_BLOCKS_SUFFIX = "_blocks"
_SCALES_SUFFIX = "_scales"
# of integers of GPTQ, AWQ and compressed-tensors
_PACKED_SUFFIXES = (".qweight", ".weight_packed")


class Quantization(Enum):
    """The values of `quant_method` that moec reads."""

    NONE = "none"
    FP8_BLOCK = "fp8"
    MXFP4 = "mxfp4"


@dataclass(frozen=True)
class QuantizationScheme:
    """How a checkpoint is quantised; `block_size` is (rows, columns) of an fp8 block."""

    kind: Quantization
    block_size: tuple[int, int] = (0, 0)


def read_quantization_config(quantization_config: object, where: str) -> QuantizationScheme:
    """The scheme that config.json's `quantization_config` (a dict, an object of transformers, or None) describes.

    Raises UnsupportedModelError, naming the method, for every scheme but DeepSeek-V3's fp8 blocks and MXFP4.
    """
    if quantization_config is None:
        return QuantizationScheme(Quantization.NONE)
    where = f"{where}, quantization_config"
    values: Mapping[str, Any]
    if isinstance(quantization_config, Mapping):
        values = quantization_config
    else:
        values = dict(vars(quantization_config))
    method = values.get("quant_method")
    method = str(getattr(method, "value", method))
    if method == Quantization.MXFP4.value:
        return QuantizationScheme(Quantization.MXFP4)
    if "quant_method" not in values:
        raise _unsupported("the checkpoint is quantised, and no quant_method says how", where)
    if method != Quantization.FP8_BLOCK.value:
        raise _unsupported(f"the checkpoint is quantised with quant_method {method!r}", where)
    block_size = values.get("weight_block_size")
    sizes = tuple(block_size) if isinstance(block_size, (list, tuple)) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise _unsupported(f"the checkpoint is quantised to fp8 with weight_block_size {block_size!r}", where)
    for key, expected in (("activation_scheme", "dynamic"), ("expert_dtype", "fp8")):
        if values.get(key, expected) != expected:
            raise _unsupported(f"the checkpoint is quantised to fp8 with {key} {values[key]!r}", where)
    return QuantizationScheme(Quantization.FP8_BLOCK, (sizes[0], sizes[1]))


def _unsupported(problem: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        problem,
        where=where,
        hint="moec reads fp8 with weight_block_size (as DeepSeek-V3) and mxfp4 (as gpt-oss); "
        "use such a checkpoint or one that is not quantised",
    )


def symbolic_tensors(checkpoint: Checkpoint, scheme: QuantizationScheme) -> dict[str, SymbolicTensor]:
    """The checkpoint's tensors by name, a quantised weight with its scales as one float32 tensor under its plain name.

    Raises UnsupportedModelError, naming the tensors, where weights and scales do not belong together.
    """
    if scheme.kind is Quantization.MXFP4:
        return _mxfp4_tensors(checkpoint)
    tensors: dict[str, SymbolicTensor] = {}
    for name in checkpoint:
        spec = checkpoint.spec(name)
        scale = name + _SCALE_SUFFIX
        if scheme.kind is Quantization.FP8_BLOCK and name.endswith(_SCALE_SUFFIX):
            if name.removesuffix(_SCALE_SUFFIX) not in checkpoint:
                raise _inconsistent(f"the scales {name} have no weight", checkpoint, name)
        elif scheme.kind is Quantization.FP8_BLOCK and scale in checkpoint:
            tensors[name] = _fp8_tensor(checkpoint, name, scale, scheme.block_size)
        elif spec.dtype in _FLOAT8:
            problem = (
                f"the float8 tensor {name} has no scales {scale}"
                if scheme.kind is Quantization.FP8_BLOCK
                else f"the tensor {name} is float8, but config.json has no quantization_config"
            )
            raise _inconsistent(problem, checkpoint, name)
        elif name.endswith(_PACKED_SUFFIXES) and not spec.dtype.is_floating_point:
            raise _unsupported(f"the tensor {name} is packed weights", str(checkpoint.location(name).path))
        else:
            tensors[name] = SymbolicTensor(Reference(name), spec.shape, spec.dtype)
    return tensors


def _fp8_tensor(checkpoint: Checkpoint, name: str, scale: str, block_size: tuple[int, int]) -> SymbolicTensor:
    weight_spec, scale_spec = checkpoint.spec(name), checkpoint.spec(scale)
    if weight_spec.dtype not in _FLOAT8 or not scale_spec.dtype.is_floating_point:
        raise _inconsistent(f"{name} is {weight_spec} with scales {scale_spec}, not float8", checkpoint, name)
    rows, columns = block_size
    shape = weight_spec.shape
    if len(shape) < 2:
        raise _inconsistent(f"{name} is {weight_spec}, which has no blocks", checkpoint, name)
    expected = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    if scale_spec.shape != expected:
        raise _inconsistent(
            f"{name} of shape {list(shape)} in blocks of {rows} x {columns} needs scales of shape {list(expected)}, "
            f"but {scale} has {list(scale_spec.shape)}",
            checkpoint,
            scale,
        )
    expression = Fp8Block(Reference(name), Reference(scale), rows, columns)
    return SymbolicTensor(expression, shape, torch.float32)


def _mxfp4_tensors(checkpoint: Checkpoint) -> dict[str, SymbolicTensor]:
    tensors: dict[str, SymbolicTensor] = {}
    for name in checkpoint:
        spec = checkpoint.spec(name)
        if name.endswith(_SCALES_SUFFIX) and spec.dtype == torch.uint8:
            if name.removesuffix(_SCALES_SUFFIX) + _BLOCKS_SUFFIX not in checkpoint:
                raise _inconsistent(f"the scales {name} have no blocks", checkpoint, name)
        elif name.endswith(_BLOCKS_SUFFIX) and spec.dtype == torch.uint8:
            base = name.removesuffix(_BLOCKS_SUFFIX)
            scales = base + _SCALES_SUFFIX
            if scales not in checkpoint:
                raise _inconsistent(f"the blocks {name} have no scales", checkpoint, name)
            scale_spec = checkpoint.spec(scales)
            if len(spec.shape) != 4 or scale_spec.shape != spec.shape[:-1] or scale_spec.dtype != torch.uint8:
                raise _inconsistent(
                    f"{name} is {spec} with scales {scale_spec}; blocks must be [experts, rows, groups, bytes] and "
                    "scales [experts, rows, groups]",
                    checkpoint,
                    name,
                )
            if base in checkpoint:
                raise _inconsistent(f"there are both {base} and {name}", checkpoint, name)
            experts, rows, groups, packed = spec.shape
            expression: Expression = Mxfp4(Reference(name), Reference(scales))
            tensors[base] = SymbolicTensor(expression, (experts, groups * packed * 2, rows), torch.float32)
        elif spec.dtype in _FLOAT8:
            raise _inconsistent(f"{name} is {spec} in an mxfp4 checkpoint", checkpoint, name)
        else:
            tensors[name] = SymbolicTensor(Reference(name), spec.shape, spec.dtype)
    if not any(isinstance(tensor.expression, Mxfp4) for tensor in tensors.values()):
        problem = f"the quantization_config says mxfp4, and no tensor is called *{_BLOCKS_SUFFIX}"
        raise _inconsistent(problem, checkpoint, next(iter(checkpoint)))
    return tensors


def _inconsistent(problem: str, checkpoint: Checkpoint, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        problem,
        where=str(checkpoint.location(name).path),
        hint="config.json and the weights do not belong together, or the checkpoint is incomplete",
    )
