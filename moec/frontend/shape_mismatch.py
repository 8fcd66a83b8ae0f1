"""Explains tensors that do not fit config.json by the field that is most likely wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from transformers import PretrainedConfig

from moec.errors import UnsupportedModelError

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def explain_shape_mismatch(
    parameter: str,
    expected: tuple[int, ...],
    tensors: list[str],
    actual: tuple[int, ...],
    config: PretrainedConfig,
    where: str,
) -> UnsupportedModelError:
    """The error for tensors that give shape `actual` where the model has `expected`, naming the fields of that size."""
    names = tensors[0] if len(tensors) == 1 else f"the {len(tensors)} tensors {tensors[0]} ... {tensors[-1]}"
    clues = []
    if len(expected) == len(actual):
        for wanted, got in zip(expected, actual, strict=True):
            if wanted != got:
                fields = [f"{name} = {wanted}" for name in _fields_of_size(config, wanted)]
                fields += [f"{name} = {wanted // 2}" for name in _fields_of_size(config, wanted / 2) if not fields]
                clues.append(f"{' or '.join(fields[:3]) or f'a size of {wanted}'} in config.json, {got} in the tensors")
    return UnsupportedModelError(
        f"{names} make shape {list(actual)}, but config.json makes the parameter {parameter} {list(expected)}",
        where=where,
        hint=f"check {'; '.join(clues)}" if clues else "check that config.json belongs to these weights",
    )


def explain_unexpected_tensor(tensors: list[str], parameters: Collection[str], config: PretrainedConfig) -> str:
    """A hint for tensors that the model has no place for: too few layers in config.json, or another model."""
    fields = dict(_integer_fields(config))
    for name in tensors:
        for match in _LAYER_NUMBER.finditer(name):
            head, number = name[: match.start()], int(match.group(1))
            counts = [field for field in _LAYER_COUNTS if fields.get(field) == number]
            if counts and any(f"{head}.{number - 1}." in parameter for parameter in parameters):
                return f"check {counts[0]} = {number} in config.json: the checkpoint has more layers"
    return "config.json describes another model than the weights; check `architectures` and the sizes in it"


def _fields_of_size(config: PretrainedConfig, size: float) -> list[str]:
    """Names of config fields with this value, those about experts first where several fit."""
    names = {name for name, value in _integer_fields(config) if value == size}
    return sorted(names, key=lambda name: ("expert" not in name, name.endswith("_id"), name))


def _integer_fields(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    for section in (config, config.get_text_config()):
        for name, value in section.to_dict().items():
            if isinstance(value, int) and not isinstance(value, bool):
                yield name, value
