"""Text as tokens: the tokenizer beside a model, without transformers and without running anything that is in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moec.errors import UnsafeInputError, UsageError

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one text. `ids` int64 [n]; `starts` and `ends` are the characters that each token stands for."""

    name: str
    text: str
    ids: NDArray[np.int64]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def bytes_of(self, first: int, last: int) -> int:
        """UTF-8 bytes of the text that the tokens `first` to `last - 1` stand for."""
        if last <= first:
            return 0
        return len(self.text[self.starts[first] : self.ends[last - 1]].encode())


class TextCodec:
    """Encodes and decodes with `tokenizer.json` of a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if the folder has no tokenizer.json, UnsafeInputError if it is malformed."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise UsageError(
                f"the folder has no {TOKENIZER_FILE}, so text cannot become tokens",
                where=str(folder),
                hint="save the tokenizer there with transformers: AutoTokenizer...save_pretrained(folder)",
            )
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the Rust parser raises plain Exception
            raise UnsafeInputError(f"the tokenizer is malformed: {error}", where=str(path)) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.end_ids = _end_tokens(folder)

    def read(self, path: Path) -> TokenizedText:
        """The tokens of a text file, special tokens not added. Raises UsageError for a missing or non-UTF-8 file."""
        if not path.is_file():
            raise UsageError("there is no such text file", where=str(path))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"the text is not UTF-8: {error}", where=str(path)) from None
        return self.encode_text(path.name, text)

    def encode_text(self, name: str, text: str) -> TokenizedText:
        """The tokens of `text` with their places in it, special tokens not added."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts, ends = zip(*encoding.offsets, strict=True) if encoding.offsets else ((), ())
        return TokenizedText(name, text, np.asarray(encoding.ids, np.int64), starts, ends)

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a prompt, with the special tokens that the model expects around one."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))


def _end_tokens(folder: Path) -> frozenset[int]:
    """The tokens that end a generation, from generation_config.json, else config.json; none if neither says."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UnsafeInputError(f"the file is not a JSON object: {error}", where=str(path)) from None
        values = value if isinstance(value, list) else [value]
        ids = frozenset(item for item in values if isinstance(item, int) and not isinstance(item, bool))
        if ids:
            return ids
    return frozenset()
