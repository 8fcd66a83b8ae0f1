"""What a checkpoint of a transformers model holds on disk: names and tensors, as `save_pretrained` would write them.

transformers' own conversions are run backwards on tensors without numbers, so that each tensor on disk becomes an
expression over parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from moec.errors import MoecError, UnsupportedModelError
from moec.frontend.symbolic_tensor import SymbolicTensor
from moec.weights.expression import Expression, Reference
from moec.weights.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter that is a copy of another one by the config: the name under which both are stored."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def disk_tensors(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec], present: Collection[str]
) -> dict[str, tuple[Expression, TensorSpec]]:
    """The tensors of a checkpoint by name, in transformers' order, as expressions over the parameters in `present`.

    Raises UnsupportedModelError where transformers cannot save the model in the layout that it loads.
    """
    tied = tied_names(model)
    patterns = model._keys_to_ignore_on_save or ()
    symbolic = {
        name: SymbolicTensor(Reference(name), specs[name].shape, specs[name].dtype)
        for name in specs
        if name in present and name not in tied and name not in patterns
    }
    try:
        found = revert_weight_conversion(model, symbolic)
    except MoecError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot convert the weights of {type(model).__name__} back to what it loads: {error}"
        ) from error
    tensors = {}
    for name in sorted(found, key=dot_natural_key):
        tensor = found[name]
        if not isinstance(tensor, SymbolicTensor):
            raise UnsupportedModelError(f"transformers' conversion of {name} computes and does not only move elements")
        tensors[name] = (tensor.expression, TensorSpec(tuple(tensor.shape), tensor.dtype))
    written = {reference.name for expression, _ in tensors.values() for reference in expression.references()}
    lost = [name for name in symbolic if name not in written]
    if lost:
        raise UnsupportedModelError(f"transformers' conversion to the layout on disk loses {', '.join(lost[:4])}")
    return tensors
