"""The inputs of a language model from token ids alone."""

from __future__ import annotations

import torch

from moec.dialects.builtin import FuncOp
from moec.errors import UsageError
from moec.ir import DType, TensorType
from moec.reference.element_types import stored_type


def language_model_inputs(
    function: FuncOp, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """All inputs of `function` for token ids i64 [batch, seq] and their padding mask (1 = token; default: no padding).

    `position_ids` count from the first token of each row, `token_type_ids` are 0, every cache input is empty.
    Raises UsageError for an input of another name.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
    inputs: dict[str, torch.Tensor] = {}
    for name, argument in zip(function.arg_names, function.arguments, strict=True):
        kind = argument.type
        assert isinstance(kind, TensorType)
        match name:
            case "input_ids":
                inputs[name] = input_ids
            case "attention_mask":
                inputs[name] = mask
            case "position_ids":
                inputs[name] = (mask.cumsum(1) - 1).clamp_min(0)
            case "token_type_ids":
                inputs[name] = torch.zeros_like(input_ids)
            case _ if kind.rank == 4 and kind.dtype is not DType.I64 and kind.symbols() == {"batch", "past"}:
                shape = kind.evaluate({"batch": input_ids.shape[0], "past": 0})
                inputs[name] = torch.empty(shape, dtype=stored_type(kind.dtype))
            case _:
                raise UsageError(f"the input {name} cannot be made from token ids", hint="give all inputs yourself")
    return inputs
