"""What transformers makes of a config, as IR: the same operations as ours where the config says the same model.

The template has no numbers. Each of its weights names the parameter of transformers' model that it is, so whatever
stands at its place in our IR is the value of that parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moec.artifact.options import DECODER_PIPELINE, RAISING_PIPELINE
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.frontend.empty_model import build_empty_model
from moec.frontend.huggingface import import_options
from moec.frontend.import_graph import import_program
from moec.frontend.model_config import CONFIG_FILE, ModelSource, resolve_model
from moec.frontend.trace import trace_model
from moec.ir import TensorType
from moec.module import Module, SourceFacts
from moec.pipeline.manager import PassManager, Pipeline
from moec.weights.context import WeightContext
from moec.weights.expression import Reference, Stored
from moec.weights.safetensors_file import Region
from moec.weights.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NamedWeights(WeightContext):
    """Parameters by name, of which only shape and element type exist; numbers are made up when somebody asks.

    The numbers differ from element to element, so that numeric checks of passes see a model in general position.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        self._specs = specs

    def leaf_spec(self, leaf: Reference | Stored) -> TensorSpec:
        """Shape and element type of a parameter; KeyError for an unknown one."""
        return self._specs[leaf.name if isinstance(leaf, Reference) else leaf.digest]

    def leaf_part(self, leaf: Reference | Stored, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """Made-up numbers between -1/2 and 1/2, the same for the same place."""
        spec = self.leaf_spec(leaf)
        phase = torch.zeros([len(part) for part in region], dtype=torch.float32)
        for dim, part in enumerate(region):
            sizes = [1] * len(region)
            sizes[dim] = len(part)
            places = torch.arange(part.start, part.stop, part.step, dtype=torch.float32).reshape(sizes)
            phase = phase + torch.frac(places * math.sqrt(dim + 2.0))
        value = (torch.frac(phase) - 0.5).to(spec.dtype)
        return value if out is None else out.copy_(value)


@dataclass(frozen=True)
class Template:
    """The IR of the model that transformers builds from `values`, and that model, of shapes alone."""

    values: dict[str, Any]
    source: ModelSource
    model: PreTrainedModel
    module: Module
    specs: dict[str, TensorSpec]
    """Parameters and persistent buffers by name, tied ones under each of their names."""


def build_template(values: dict[str, Any], *, with_cache: bool, traced: Module | None = None) -> Template:
    """Builds, traces and raises the model of config values without `quantization_config`.

    `with_cache`: whether the IR to compare with has its key/value cache as operands. `traced`: the module that a
    checkpoint folder with these values was loaded as, as long as no pass has changed it; it saves the tracing.
    Raises UnsupportedModelError where transformers does not build or torch does not trace a model of these values.
    """
    source = resolve_model(values, CONFIG_FILE)
    empty = build_empty_model(source)
    tensors = empty.model.state_dict()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    op = None if traced is None else _renamed(traced.op, specs)
    if op is None:
        program = trace_model(source, empty)
        op = import_program(
            program.program, import_options(program, {name: str(Reference(name)) for name in specs})
        ).module
    kind = "decoder" if source.is_decoder else "encoder"
    facts = SourceFacts(kind, source.model_type, source.model_class.__name__, values)
    module = Module(op, NamedWeights(specs), facts)
    raise_module(module, with_cache=with_cache)
    return Template(values, source, empty.model, module, specs)


def _renamed(traced: ModuleOp, specs: Mapping[str, TensorSpec]) -> ModuleOp | None:
    """A copy in which every weight is the parameter of its name; None where one is no parameter."""
    copy = traced.clone()
    assert isinstance(copy, ModuleOp)
    for op in copy.walk():
        if isinstance(op, WeightOp):
            spec, kind = specs.get(op.weight_name), op.value.type
            if spec is None or not isinstance(kind, TensorType) or kind.static_shape != spec.shape:
                return None
            op.source = str(Reference(op.weight_name))
    return copy


def raise_module(module: Module, *, with_cache: bool) -> None:
    """Brings a module into the form in which two of them are compared."""
    text = f"{RAISING_PIPELINE},{DECODER_PIPELINE}" if with_cache else RAISING_PIPELINE
    PassManager(Pipeline.parse(text)).run(module.op, weights=module.weights, module=module)


def has_cache(module: Module) -> bool:
    """Whether the module's function takes and gives its key/value cache."""
    return any(name.startswith("past_key_values.") for name in module.main.arg_names)


def source_folder(module: Module) -> Path | None:
    """The Hugging Face folder that a module was loaded from."""
    return module.source.folder if module.source.kind in ("decoder", "encoder") else None
