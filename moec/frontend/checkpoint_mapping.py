"""Which checkpoint tensors make each parameter: transformers' own conversion mapping, as lazy weight expressions.

The renamings and conversions are taken from transformers and run on tensors without numbers (`SymbolicTensor`), so no
table of names or architectures is kept here. Every tensor of the checkpoint is used or named in an error.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from moec.errors import MoecError, UnsupportedModelError
from moec.frontend.quantized_checkpoint import read_quantization_config, symbolic_tensors
from moec.frontend.shape_mismatch import explain_shape_mismatch, explain_unexpected_tensor
from moec.frontend.symbolic_tensor import SymbolicTensor
from moec.weights.checkpoint import Checkpoint
from moec.weights.context import WeightContext
from moec.weights.expression import Cast, Expression

# Old checkpoints hold these tables that transformers computes from the config and never reads.
_COMPUTED_TABLES = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class CheckpointMapping:
    """Parameters and persistent buffers of a model as expressions over the tensors of a checkpoint.

    `expressions`: by full name in the model, each of the model's shape, floats as float32.
    `used`: the checkpoint tensors that were used; `ignored`: those that transformers ignores for this model as well.
    `missing`: parameters that no tensor was found for, only such as were not required.
    """

    expressions: dict[str, Expression]
    used: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]

    def summary(self) -> str:
        """One line for people: how many of the checkpoint's tensors were used."""
        total = len(self.used) + len(self.ignored)
        text = f"{len(self.used)} of {total} checkpoint tensors used"
        return f"{text}, {len(self.ignored)} not weights of this model" if self.ignored else text


def map_checkpoint(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    *,
    quantization_config: object = None,
    required: Collection[str] | None = None,
) -> CheckpointMapping:
    """The expressions for all parameters and persistent buffers of `model`, which needs no weights of its own.

    `quantization_config` is config.json's, if it was taken out of the model's config. `required` names the parameters
    that must be there (default: all); others may be missing from the checkpoint.

    Raises UnsupportedModelError, naming tensors and where possible the field of config.json, when a tensor is missing,
    left over, of the wrong shape, quantised in an unknown way, converted by an operation that computes, or when tied
    tensors differ.
    """
    config = model.config
    if quantization_config is None:
        quantization_config = getattr(config, "quantization_config", None)
    scheme = read_quantization_config(quantization_config, str(checkpoint.folder / "config.json"))
    sources = symbolic_tensors(checkpoint, scheme)
    parameters = model.state_dict()
    collected = _collect(model, sources, parameters)
    found = _Found()
    for target, group in collected.groups.items():
        _convert(model, target, group, parameters, checkpoint, found)
    ignored = _check_unexpected(model, collected.unexpected, parameters, checkpoint)
    _tie(model, found, WeightContext(checkpoint))
    missing = _check_missing(model, parameters, found, required, checkpoint)
    ordered = {name: found.expressions[name] for name in parameters if name in found.expressions}
    used = {reference.name for name in found.inputs for reference in sources[name].expression.references()}
    skipped = {reference.name for name in ignored for reference in sources[name].expression.references()}
    _check_accounting(checkpoint, used, skipped)
    return CheckpointMapping(ordered, tuple(sorted(used)), tuple(sorted(skipped)), missing)


@dataclass
class _Group:
    """The checkpoint tensors that one conversion or renaming takes in, and which of its patterns each one matched."""

    transform: WeightTransform
    converter_pattern: str | None
    tensors: dict[str, list[tuple[str, SymbolicTensor]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def names(self) -> list[str]:
        return [name for tensors in self.tensors.values() for name, _ in tensors]


@dataclass
class _Collected:
    groups: dict[str, _Group] = field(default_factory=dict)
    unexpected: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Found:
    expressions: dict[str, Expression] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)


def _collect(
    model: PreTrainedModel, sources: dict[str, SymbolicTensor], parameters: dict[str, torch.Tensor]
) -> _Collected:
    """Rename every tensor as `from_pretrained` does, and gather those that are converted together."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    collected = _Collected()
    for name in sorted(sources, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target not in parameters:
            collected.unexpected.append((name, target))
            continue
        group = collected.groups.get(target)
        if group is None:
            transform = WeightRenaming(name, target) if pattern is None else deepcopy(by_pattern[pattern])
            group = collected.groups[target] = _Group(transform, pattern)
        same_kind = pattern is not None and pattern in group.transform.source_patterns
        if group.tensors and (group.converter_pattern is None or not same_kind):
            raise UnsupportedModelError(
                f"the checkpoint tensors {group.names[0]} and {name} would both become the parameter {target}",
                hint="the checkpoint mixes two layouts; keep one",
            )
        group.tensors[name if pattern is None else pattern].append((name, sources[name]))
    return collected


def _convert(
    model: PreTrainedModel,
    first_target: str,
    group: _Group,
    parameters: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    found: _Found,
) -> None:
    """Run the conversion of transformers on one group and take its results as expressions."""
    for pattern, tensors in group.tensors.items():
        _check_numbering(pattern, [name for name, _ in tensors], checkpoint)
        for name, tensor in tensors:
            group.transform.add_tensor(first_target, name, pattern, tensor)
    where = f"{checkpoint.folder}, tensors for parameter {first_target}"
    try:
        results: dict[str, Any] = group.transform.convert(first_target, model=model, config=model.config)
    except MoecError as error:
        raise type(error)(error.message, where=error.where or where, hint=error.hint) from error
    except Exception as error:
        operations = getattr(group.transform, "operations", [])
        raise UnsupportedModelError(
            f"transformers' conversion {operations} cannot be applied to {_some(group.names)}: {error}",
            where=where,
            hint="the checkpoint is incomplete, or its layout contradicts config.json",
        ) from error
    elements = 0
    for target, result in results.items():
        tensor = result[0] if isinstance(result, list) else result
        if not isinstance(tensor, SymbolicTensor) or target not in parameters:
            raise UnsupportedModelError(
                f"transformers' conversion of {_some(group.names)} gives {target}, which the model does not have",
                where=where,
                hint="the layout of the checkpoint contradicts config.json",
            )
        if target in found.expressions:
            raise UnsupportedModelError(f"two conversions both give the parameter {target}", where=where)
        parameter = parameters[target]
        if tensor.shape != parameter.shape:
            raise explain_shape_mismatch(
                target, tuple(parameter.shape), group.names, tuple(tensor.shape), model.config, str(checkpoint.folder)
            )
        elements += tensor.numel()
        found.expressions[target] = _as_parameter_type(target, tensor, parameter.dtype, where)
    if elements != sum(tensor.numel() for tensors in group.tensors.values() for _, tensor in tensors):
        raise UnsupportedModelError(
            f"transformers' conversion of {_some(group.names)} leaves some of their elements unused", where=where
        )
    found.inputs.update(group.names)


def _as_parameter_type(target: str, tensor: SymbolicTensor, dtype: torch.dtype, where: str) -> Expression:
    """Floats become float32, whatever the model was built with; integers must be integers on both sides."""
    wanted = torch.float32 if dtype.is_floating_point else dtype
    if tensor.dtype == wanted:
        return tensor.expression
    if tensor.dtype.is_floating_point != dtype.is_floating_point or tensor.dtype.is_complex:
        raise UnsupportedModelError(
            f"the parameter {target} is {dtype}, but the checkpoint has {tensor.dtype} for it",
            where=where,
            hint="the checkpoint may be quantised without saying so in config.json",
        )
    return Cast(tensor.expression, wanted)


def _check_numbering(pattern: str, names: list[str], checkpoint: Checkpoint) -> None:
    """Tensors of a `*` pattern must be numbered 0, 1, 2, ...: their position in the list is all that is left of it."""
    if "*" not in pattern or len(names) < 2:
        return
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    varying = [column for column in zip(*numbers, strict=False) if len(set(column)) > 1]
    if len(varying) == 1 and list(varying[0]) != list(range(len(names))):
        absent = sorted(set(range(max(varying[0]) + 1)) - set(varying[0]))
        raise UnsupportedModelError(
            f"the tensors {_some(names)} must be numbered from 0 without gaps, but {absent[:5]} are missing",
            where=str(checkpoint.folder),
            hint="the checkpoint is incomplete; download it again",
        )


def _tie(model: PreTrainedModel, found: _Found, context: WeightContext) -> None:
    """Give tied parameters one expression; refuse those that are both there and differ."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in tied.items():
        first, second = found.expressions.get(source), found.expressions.get(target)
        if first is None and second is None:
            first = next(
                (found.expressions[t] for t, s in tied.items() if s == source and t in found.expressions), None
            )
        if first is not None and second is not None and first != second and not _equal(context, first, second):
            raise UnsupportedModelError(
                f"config.json ties {target} to {source}, but the checkpoint has different values for them",
                where=str(context.checkpoint.folder) if context.checkpoint else "",
                hint="set tie_word_embeddings to false in config.json if both are meant",
            )
        value = first if first is not None else second
        if value is not None:
            found.expressions[source] = found.expressions[target] = value


def _equal(context: WeightContext, first: Expression, second: Expression) -> bool:
    """Whether two expressions have the same values, compared piece by piece."""
    if context.shape_dtype(first) != context.shape_dtype(second):
        return False
    pairs = zip(context.chunks(first), context.chunks(second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _check_unexpected(
    model: PreTrainedModel,
    unexpected: list[tuple[str, str]],
    parameters: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
) -> list[str]:
    """The tensors that may be left over. Raises UnsupportedModelError for the others, naming them."""
    patterns = sorted(model._keys_to_ignore_on_load_unexpected or ())
    ignored: list[str] = []
    others: list[str] = []
    for name, target in unexpected:
        known = _COMPUTED_TABLES.search(target) or any(re.search(pattern, target) for pattern in patterns)
        (ignored if known else others).append(name)
    if others:
        raise UnsupportedModelError(
            f"{len(others)} of {len(checkpoint)} checkpoint tensors are not used by {type(model).__name__}: "
            f"{_some(others)}",
            where=str(checkpoint.folder),
            hint=explain_unexpected_tensor(others, parameters, model.config),
        )
    return ignored


def _check_missing(
    model: PreTrainedModel,
    parameters: dict[str, torch.Tensor],
    found: _Found,
    required: Collection[str] | None,
    checkpoint: Checkpoint,
) -> tuple[str, ...]:
    missing = [name for name in parameters if name not in found.expressions]
    needed = [name for name in missing if required is None or name in required]
    if needed:
        raise UnsupportedModelError(
            f"the checkpoint has no tensor for {len(needed)} parameters of {type(model).__name__}: {_some(needed)}",
            where=str(checkpoint.folder),
            hint="config.json describes another model than the weights, or a shard is missing",
        )
    return tuple(missing)


def _check_accounting(checkpoint: Checkpoint, used: set[str], ignored: set[str]) -> None:
    lost = [name for name in checkpoint if name not in used and name not in ignored]
    if lost:
        raise UnsupportedModelError(
            f"{len(lost)} checkpoint tensors were neither used nor refused: {_some(lost)}",
            where=str(checkpoint.folder),
            hint="this is a defect of moec; please report it with the config.json",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
