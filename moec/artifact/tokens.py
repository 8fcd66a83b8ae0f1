"""Token batches to check models with: real text in the model's own tokens, one row shorter and padded on the left."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moec.artifact.text import TOKENIZER_FILE, TextCodec
from moec.errors import UsageError
from moec.ir import TensorType

if TYPE_CHECKING:
    import torch

    from moec.dialects.builtin import FuncOp
    from moec.module import Module


@dataclass(frozen=True)
class TokenBatch:
    """`ids` and `mask`, int64 [rows, length]."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


def token_batch(module: Module, *, rows: int, length: int, text: Path | None = None, seed: int = 0) -> TokenBatch:
    """Tokens for `module`: where it has a tokenizer from `text` or a passage that moec brings along, else random ones.

    The last row is a third shorter: decoders get its padding in front, encoders behind.
    Raises UsageError for a text with too few tokens.
    """
    vocabulary = vocabulary_size(module)
    folder = module.source.folder
    if folder is not None and (folder / TOKENIZER_FILE).is_file():
        codec = TextCodec(folder)
        passage = files("moec.artifact").joinpath("passage.txt").read_text(encoding="utf-8")
        found = codec.encode_text("passage", passage) if text is None else codec.read(text)
        stream = found.ids[found.ids < vocabulary]
        if text is None:
            stream = np.resize(stream, max(rows * length, len(stream)))
    else:
        stream = np.random.default_rng(seed).integers(0, vocabulary, rows * length)
    if len(stream) < rows * length:
        raise UsageError(
            f"the text has {len(stream)} tokens, the check needs {rows * length}",
            where=str(text),
            hint="give a longer text",
        )
    ids = np.ascontiguousarray(stream[: rows * length].reshape(rows, length)).astype(np.int64)
    mask = np.ones_like(ids)
    if rows > 1:
        padding = slice(0, length // 3) if module.source.kind == "decoder" else slice(length - length // 3, length)
        ids[-1, padding] = 0
        mask[-1, padding] = 0
    return TokenBatch(ids, mask)


def vocabulary_size(module: Module) -> int:
    """Number of token ids that the model knows: rows of its embedding table. Raises UsageError if it has none."""
    for op in module.op.walk():
        if op.name.startswith("aten.embedding."):
            table = op.operands[0].type
            if isinstance(table, TensorType) and isinstance(table.shape[0], int):
                size = module.config.get("vocab_size")
                return min(size, table.shape[0]) if isinstance(size, int) else table.shape[0]
    raise UsageError("the model has no token embedding", hint="only language models can be checked on text")


def function_inputs(function: FuncOp, batch: TokenBatch) -> dict[str, torch.Tensor]:
    """The inputs of `main` for a batch: ids, mask, positions, token types, and caches that hold nothing."""
    import torch

    from moec.artifact.runtime import positions

    known = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "position_ids": positions(batch.mask),
        "token_type_ids": np.zeros_like(batch.ids),
    }
    inputs: dict[str, torch.Tensor] = {}
    for name, argument in zip(function.arg_names, function.arguments, strict=True):
        if name in known:
            inputs[name] = torch.from_numpy(np.ascontiguousarray(known[name]))
        elif name.startswith("past_key_values.") and isinstance(argument.type, TensorType):
            _, heads, _, size = argument.type.shape
            assert isinstance(heads, int) and isinstance(size, int)
            inputs[name] = torch.zeros(len(batch.ids), heads, 0, size)
        else:
            raise UsageError(f"the model has an input {name}, which text alone does not give")
    return inputs
