"""Several models of one shape as one source: their weights lie beside each other, under names with a prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.errors import UsageError
from moec.frontend.model_config import CONFIG_FILE, read_config, resolve_model
from moec.weights.checkpoint import Checkpoint, JoinedCheckpoint, name_in_other, resolve_member
from moec.weights.expression import Expression, Reference, Stored
from moec.weights.json_file import read_json_object
from moec.weights.tensor_spec import TensorSpec

_TOKENIZER = "tokenizer.json"
# read where there is no tokenizer.json
_TOKENIZER_PARTS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
# what a tokenizer.json says besides which text becomes which tokens
_NOT_TOKENS = frozenset({"truncation", "padding", "version"})
# what a config says besides what is computed
_NOT_COMPUTED = frozenset(
    {
        "_name_or_path", "name_or_path", "transformers_version", "use_cache", "return_dict", "output_hidden_states",
        "output_attentions", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OtherSource:
    """A model beside the first one, of the same architecture, sizes and tokens. `number` counts from 1."""

    number: int
    folder: Path

    def expression(self, expression: Expression) -> Expression:
        """What is computed from this model's tensors as `expression` is from those of the first one.

        Raises UsageError where a pass computed something of it, for which there is no counterpart.
        """
        if isinstance(expression, Reference):
            return Reference(name_in_other(self.number, expression.name))
        if isinstance(expression, Stored):
            raise UsageError(
                "a weight was computed from the first model alone, so that the other models have none like it",
                where=str(expression)[:80],
                hint="join models in front of passes that compute weights",
            )
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(expression):
            value = getattr(expression, field.name)
            if isinstance(value, Expression):
                changed[field.name] = self.expression(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Expression):
                changed[field.name] = tuple(self.expression(part) for part in value)
        return dataclasses.replace(expression, **changed)


def join_sources(
    folder: Path, checkpoint: Checkpoint, others: Sequence[Path]
) -> tuple[Checkpoint, tuple[OtherSource, ...]]:
    """The checkpoint with those of the other folders beside it.

    Raises UsageError where another model differs in what it computes, in its tensors' names, shapes or types, or in its
    tokens, with the field or the tensor; and what `read_config` and `Checkpoint.open` raise.
    """
    opened = []
    for other in others:
        require_equal_configs(folder, other)
        second = Checkpoint.open(other)
        _compare_tensors(checkpoint, second)
        _compare_tokenizers(folder, other)
        opened.append(second)
    found = tuple(OtherSource(number, other) for number, other in enumerate(others, 1))
    return (JoinedCheckpoint(checkpoint, opened) if opened else checkpoint), found


def require_equal_configs(folder: Path, other: Path) -> None:
    """Raises UsageError that names the first field in which two models would compute something else."""
    values = [_resolved(item) for item in (folder, other)]
    first, second = ({key: item[key] for key in item.keys() - _NOT_COMPUTED} for item in values)
    place = _difference(first, second)
    if place is not None:
        raise UsageError(
            f"the models differ in {place}",
            where=f"{other / CONFIG_FILE}, beside {folder}",
            hint="several sources must be of one architecture and size",
        )


def _resolved(folder: Path) -> dict[str, Any]:
    """The config with its defaults, so that it does not matter whether a default is written out."""
    values = read_config(folder)
    source = resolve_model(values, str(folder / CONFIG_FILE))
    found: dict[str, Any] = source.config.to_dict()
    for name in ("dtype", "torch_dtype"):
        found.pop(name, None)
    return {**found, "architectures": [source.model_class.__name__]}


def _compare_tensors(first: Checkpoint, other: Checkpoint) -> None:
    for name in sorted({*first, *other}):
        specs: list[TensorSpec | None] = [item.spec(name) if name in item else None for item in (first, other)]
        if specs[0] != specs[1]:
            shown = ["not there" if spec is None else str(spec) for spec in specs]
            raise UsageError(
                f"the models differ in the tensor {name}: {shown[0]} in the first one, {shown[1]} here",
                where=str(other.folder),
                hint="several sources must have equal tensors and element types; convert them to one type first",
            )


def _compare_tokenizers(folder: Path, other: Path) -> None:
    present = [
        [name for name in (_TOKENIZER, *_TOKENIZER_PARTS) if (item / name).is_file()] for item in (folder, other)
    ]
    names = [_TOKENIZER] if _TOKENIZER in present[0] else present[0]
    missing = [name for name in names if name not in present[1]]
    extra = [] if names else present[1]
    if missing or extra:
        raise UsageError(
            f"only one of the models has {(missing or extra)[0]}",
            where=f"{folder}, {other}",
            hint="several sources must have one tokenizer; copy its files",
        )
    for name in names:
        paths = [resolve_member(item, name) for item in (folder, other)]
        if paths[0].read_bytes() == paths[1].read_bytes():
            continue
        place: str | None = "its bytes"
        if name == _TOKENIZER:
            read = [read_json_object(path) for path in paths]
            first, second = ({key: item[key] for key in item.keys() - _NOT_TOKENS} for item in read)
            place = _difference(first, second)
        if place is not None:
            raise UsageError(
                f"the tokenizers of the models differ in {place}",
                where=f"{other / name}, beside {folder}",
                hint="several sources must give the same tokens to a text",
            )


def _difference(first: object, other: object, place: str = "") -> str | None:
    """The first field in which two JSON values differ, with both values; None where they are equal."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted({*first, *other}, key=str):
            inner = f"{place}.{key}" if place else str(key)
            if key not in first or key not in other:
                return f"{inner}, which only one of them has"
            found = _difference(first[key], other[key], inner)
            if found is not None:
                return found
        return None
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        for number, (one, two) in enumerate(zip(first, other, strict=True)):
            found = _difference(one, two, f"{place}[{number}]")
            if found is not None:
                return found
        return None
    if isinstance(first, list) and isinstance(other, list):
        return f"{place}: {len(first)} entries in the first one, {len(other)} here"
    return None if first == other else f"{place}: {str(first)[:60]} in the first one, {str(other)[:60]} here"
