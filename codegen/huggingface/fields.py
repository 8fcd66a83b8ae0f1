"""Fields of a config, found by what they do: a field is the one that holds the old number and whose change has the
wanted effect on the shapes of the model that transformers builds from it.

Names only decide which fields are tried first.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moec.frontend.model_config import CONFIG_FILE, resolve_model

Values = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

_MOST_TRIED = 24
_KEPT = 4


@dataclass(frozen=True)
class Change:
    """A number of the model that becomes another one; `words` are likely in the name of its field."""

    what: str
    old: int
    new: int
    words: re.Pattern[str]


def experts_change(old: int, new: int) -> Change:
    """Another number of router outputs."""
    return Change("number of experts", old, new, re.compile("expert"))


def width_change(old: int, new: int) -> Change:
    """Another width of experts."""
    return Change("width of experts", old, new, re.compile("moe|expert|intermediate|ffn"))


def top_k_change(old: int, new: int) -> Change:
    """Another number of experts per token."""
    return Change("number of experts per token", old, new, re.compile("top_?k|per_tok|moe_k"))


@dataclass(frozen=True)
class Field:
    """A number in a config by the keys that lead to it, or a list that holds the same number for every layer."""

    path: tuple[str, ...]
    value: int
    length: int = 0

    def __str__(self) -> str:
        return ".".join(self.path)


def number_fields(values: Values) -> list[Field]:
    """The whole numbers of the config that transformers makes of `values`, those left at their defaults included."""
    config = resolve_model(values, CONFIG_FILE).config.to_dict()
    return list(_numbers(config, ()))


def _numbers(section: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Field]:
    for key, value in section.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            yield from _numbers(value, here)
        elif isinstance(value, list) and value and all(type(item) is int and item == value[0] for item in value):
            yield Field(here, value[0], len(value))
        elif type(value) is int:
            yield Field(here, value)


def with_field(values: Values, field: Field, new: float) -> Values:
    """A copy of config values with another number in `field`, under the name that the values use for it already."""
    result = copy.deepcopy(values)
    section: Any = result
    for key in field.path[:-1]:
        section = section.setdefault(key, {})
    names = [field.path[-1]]
    if len(field.path) == 1:
        aliases = type(resolve_model(values, CONFIG_FILE).config).attribute_map
        names += [alias for alias, name in aliases.items() if name == field.path[-1]]
    written = [name for name in names if name in section] or names[:1]
    for name in written:
        section[name] = [new] * field.length if field.length else new
    return result


def candidates(values: Values, change: Change) -> list[Field]:
    """The fields that hold the old number of `change`, the likeliest first."""
    fields = [field for field in number_fields(values) if field.value == change.old]
    return sorted(fields, key=lambda field: change.words.search(field.path[-1]) is None)[:_MOST_TRIED]


def model_shapes(values: Values) -> Shapes | None:
    """Shapes of parameters and persistent buffers of the model of a config; None where transformers refuses it."""
    try:
        source = resolve_model(values, CONFIG_FILE)
        with torch.device("meta"):
            model = source.model_class._from_config(source.config, dtype=torch.float32)
    except Exception:
        # any error of transformers' constructors means that this config is no model
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def with_shapes(values: Values, changes: list[Change], wanted: Shapes) -> list[Values]:
    """Values whose model has exactly the shapes `wanted`, made from `values` by the changes, the likeliest first.

    Where a field has a side effect (the width of shared experts that is a multiple of the routed ones'), one more
    field that undoes it is looked for.
    """
    current = [values]
    for change in changes:
        current = [result for start in current for result in _changed(start, change, wanted)][:_KEPT]
    right = [result for result in current if model_shapes(result) == wanted]
    return right or [result for start in current for result in _repaired(start, changes, wanted)]


def _changed(start: Values, change: Change, wanted: Shapes) -> list[Values]:
    """The values with one field changed that bring some shapes to what is wanted; first those that spoil fewest."""
    wrong = _wrong(model_shapes(start), wanted)
    found: list[tuple[int, Values]] = []
    for field in candidates(start, change):
        result = with_field(start, field, change.new)
        now = _wrong(model_shapes(result), wanted)
        if wrong - now:
            found.append((len(now - wrong), result))
            if now < wrong:
                break
    found.sort(key=lambda item: item[0])
    return [result for _, result in found]


def _wrong(shapes: Shapes | None, wanted: Shapes) -> frozenset[str]:
    """The names of the tensors whose shapes are not as wanted; all of them where there is no model."""
    if shapes is None or shapes.keys() != wanted.keys():
        return frozenset(wanted)
    return frozenset(name for name, shape in wanted.items() if shapes[name] != shape)


def _repaired(values: Values, changes: list[Change], wanted: Shapes) -> Iterator[Values]:
    for change in changes:
        for field in number_fields(values):
            total = field.value * change.old
            if field.value > 0 and total % change.new == 0 and total != field.value * change.new:
                repaired = with_field(values, field, total // change.new)
                if model_shapes(repaired) == wanted:
                    yield repaired
