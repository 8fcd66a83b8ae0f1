"""Sequences of token ids to calibrate on: windows of text files, or of files of ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.artifact.text import TextCodec
from moec.artifact.tokens import TokenBatch, vocabulary_size
from moec.errors import UnsafeInputError, UsageError

if TYPE_CHECKING:
    from moec.module import Module

IDS_SUFFIXES = (".npy", ".json")
"""How the names of files of token ids end."""

_BUNDLED = ("kjv.calibration.txt", "shakespeare.calibration.txt")


@dataclass(frozen=True)
class CalibrationData:
    """Token ids, int64 [length] for each sequence; `available` is the number of windows they were chosen from.

    `domains` are the names of the texts, `domain` says of which of them each sequence is; ids from a file are one.
    """

    name: str
    sequences: tuple[NDArray[np.int64], ...]
    available: int
    domains: tuple[str, ...]
    domain: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and of where sequences end; the text and the tokenizer decide nothing else."""
        result = hashlib.sha256(b"moec sequences 1\n")
        for sequence in self.sequences:
            result.update(f"{len(sequence)}\n".encode())
            result.update(np.ascontiguousarray(sequence, dtype="<i8").tobytes())
        return result.hexdigest()

    def batches(self, size: int, *, padding_in_front: bool) -> Iterator[TokenBatch]:
        """Up to `size` consecutive sequences at a time, shorter ones padded with id 0."""
        for start in range(0, len(self.sequences), size):
            group = self.sequences[start : start + size]
            longest = max(len(sequence) for sequence in group)
            ids = np.zeros((len(group), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, sequence in enumerate(group):
                place = slice(longest - len(sequence), None) if padding_in_front else slice(0, len(sequence))
                ids[row, place], mask[row, place] = sequence, 1
            yield TokenBatch(ids, mask)


def read_data(
    module: Module, *, texts: Sequence[Path], tokens: Path | None, sequences: int, length: int, seed: int
) -> CalibrationData:
    """At most `sequences` windows of at most `length` tokens from text files or from a file of ids.

    Without a file the texts that moec brings along are read. Texts go through the tokenizer beside the model; `seed`
    picks the windows. A file of ids is `.npy` (one stream, or one sequence per row) or `.json` (a list of ids, or a
    list of such lists).
    Raises UsageError for files that are missing or too short and for ids that the model does not know,
    UnsafeInputError for malformed ones.
    """
    if texts and tokens is not None:
        raise UsageError("text and tokens exclude each other", hint="give either text files or a file of ids")
    if module.source.kind == "module":
        raise UsageError("this model takes no text", hint="only language models can be calibrated on text")
    names: tuple[str, ...]
    if tokens is not None:
        streams = _read_ids(tokens)
        names, of = (tokens.name,), [0] * len(streams)
    else:
        names, streams = _read_texts(module, texts)
        of = list(range(len(streams)))
    name = ", ".join(names) if texts or tokens is not None else "texts that moec brings along"
    total = sum(len(stream) for stream in streams)
    if total < 2:
        what = "is empty" if total == 0 else "has one token"
        raise UsageError(f"the calibration text {what}", where=name, hint="give a text of some thousand tokens")
    _check_vocabulary(name, streams, vocabulary_size(module))
    windows = [
        (window, domain) for stream, domain in zip(streams, of, strict=True) for window in _windows(stream, length)
    ]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(windows))[:sequences])
    taken = [windows[index] for index in chosen.tolist()]
    ids, domains = tuple(window for window, _ in taken), tuple(domain for _, domain in taken)
    return CalibrationData(name, ids, len(windows), names, domains)


def _windows(stream: NDArray[np.int64], length: int) -> list[NDArray[np.int64]]:
    """Windows that do not overlap; a stream shorter than one window is one."""
    count = len(stream) // length
    if count == 0:
        return [stream] if len(stream) else []
    return list(stream[: count * length].reshape(count, length))


def _read_texts(module: Module, texts: Sequence[Path]) -> tuple[tuple[str, ...], list[NDArray[np.int64]]]:
    """Names and tokens of the texts, or of those that moec brings along."""
    if module.source.folder is None:
        raise UsageError("the model has no folder with a tokenizer", hint="give the calibration tokens as ids")
    codec = TextCodec(module.source.folder)
    if texts:
        return tuple(path.name for path in texts), [codec.read(path).ids for path in texts]
    folder = files("moec.calibration").joinpath("texts")
    passages = [(name, folder.joinpath(name).read_text(encoding="utf-8")) for name in _BUNDLED]
    return _BUNDLED, [codec.encode_text(name, text).ids for name, text in passages]


def _read_ids(path: Path) -> list[NDArray[np.int64]]:
    if not path.is_file():
        raise UsageError("there is no such file of token ids", where=str(path))
    try:
        if path.suffix == ".npy":
            found: Any = np.load(path, allow_pickle=False)
            rows = [found] if found.ndim == 1 else list(found)
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            nested = bool(found) and isinstance(found, list) and all(isinstance(item, list) for item in found)
            rows = [np.asarray(row) for row in found] if nested else [np.asarray(found)]
        else:
            raise UsageError("a file of token ids is .npy or .json", where=str(path))
    except (ValueError, OSError, EOFError) as error:
        raise UnsafeInputError(f"the file of token ids is malformed: {error}", where=str(path)) from None
    for row in rows:
        if row.ndim != 1 or (len(row) and not np.issubdtype(row.dtype, np.integer)):
            raise UnsafeInputError(
                "the file of token ids is malformed: it must hold integers, or lists of them", where=str(path)
            )
    return [row.astype(np.int64) for row in rows]


def _check_vocabulary(name: str, streams: Sequence[NDArray[np.int64]], size: int) -> None:
    for number, stream in enumerate(streams):
        wrong = np.flatnonzero((stream < 0) | (stream >= size))
        if len(wrong):
            raise UsageError(
                f"the token id {int(stream[wrong[0]])} is outside of the vocabulary of {size}",
                where=f"{name}, sequence {number}, token {int(wrong[0])}",
                hint="tokenize the text with the tokenizer of this model",
            )
