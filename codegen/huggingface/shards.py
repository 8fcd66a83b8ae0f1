"""Writes safetensors shards and their index, tensor by tensor and part by part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from moec.codegen.huggingface.values import ParameterValues
from moec.weights.checkpoint import INDEX_FILE, SINGLE_FILE, row_regions
from moec.weights.evaluation import Evaluator
from moec.weights.expression import Expression
from moec.weights.tensor_spec import DTYPE_TO_SAFETENSORS, TensorSpec, tensor_bytes

_PART_BYTES = 64 << 20


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of the checkpoint: what it is made of, and the element type that it is stored in."""

    name: str
    expression: Expression
    spec: TensorSpec


def parts(values: ParameterValues, expression: Expression) -> Iterator[torch.Tensor]:
    """The numbers of an expression in parts along its first dimension."""
    evaluator = Evaluator(values)
    for region in row_regions(evaluator.infer(expression), _PART_BYTES):
        yield evaluator.evaluate(expression, region)


def write_shards(folder: Path, tensors: list[DiskTensor], values: ParameterValues, shard_bytes: int) -> tuple[str, ...]:
    """Writes `model.safetensors`, or numbered shards of at most `shard_bytes` (or one tensor) and their index.

    Readers want every tensor aligned to its element size, so in each shard wider element types come first.
    Gives the names of the weight files.
    """
    groups = list(_groups(tensors, shard_bytes))
    names = [
        SINGLE_FILE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        for number in range(1, len(groups) + 1)
    ]
    for name, group in zip(names, groups, strict=True):
        group.sort(key=lambda tensor: -tensor.spec.dtype.itemsize)
        with (folder / name).open("wb") as stream:
            _write_shard(stream, group, values)
    if len(groups) > 1:
        weight_map = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
        metadata = {
            "total_parameters": sum(tensor.spec.elements for tensor in tensors),
            "total_size": sum(tensor.spec.nbytes for tensor in tensors),
        }
        index = {"metadata": metadata, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / INDEX_FILE).write_text(f"{text}\n", encoding="utf-8")
    return tuple(names)


def _groups(tensors: list[DiskTensor], shard_bytes: int) -> Iterator[list[DiskTensor]]:
    group: list[DiskTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.spec.nbytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.spec.nbytes
    yield group


def _write_shard(stream: BinaryIO, tensors: list[DiskTensor], values: ParameterValues) -> None:
    stream.write(_header(tensors))
    for tensor in tensors:
        for part in parts(values, tensor.expression):
            stream.write(tensor_bytes(part.to(tensor.spec.dtype)))


def _header(tensors: list[DiskTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.spec.nbytes
        header[tensor.name] = {
            "dtype": DTYPE_TO_SAFETENSORS[tensor.spec.dtype],
            "shape": list(tensor.spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
