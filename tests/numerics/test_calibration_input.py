"""What calibrate reads, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moec.api import run_passes
from moec.calibration.data import read_data
from moec.errors import MoecError, UnsafeInputError, UsageError
from moec.module import Module
from tests.frontend.tiny_models import save_tiny_checkpoint
from tests.numerics.calibrated_models import raised, random_sequences, write_tokens

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
TEXTS = Path(__file__).parents[2] / "moec" / "calibration" / "texts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("mixtral", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def module(folder: Path) -> Module:
    return raised(folder)


@pytest.fixture(scope="module")
def with_tokenizer() -> Module:
    return raised(TINY_MOE)


def refusal(module: Module, options: str) -> MoecError:
    with pytest.raises(MoecError) as caught:
        run_passes(module, f"calibrate{{{options}}}")
    assert module.calibration is None
    return caught.value


@pytest.mark.parametrize(
    ("content", "error", "part"),
    [
        ("[]", UsageError, "is empty"),
        ("[5]", UsageError, "has one token"),
        ("[5, 6, 96]", UsageError, "the token id 96 is outside of the vocabulary of 96"),
        ("[[5, 6], [7, -1]]", UsageError, "sequence 1, token 1"),
        ("[0.5, 1]", UnsafeInputError, "it must hold integers"),
        ("[[1, [2]], [3]]", UnsafeInputError, "malformed"),
        ('{"a": 1}', UnsafeInputError, "malformed"),
        ("[1, 2", UnsafeInputError, "malformed"),
    ],
)
def test_bad_token_files(module: Module, tmp_path: Path, content: str, error: type[MoecError], part: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    found = refusal(module, f"tokens={path}")
    assert isinstance(found, error)
    assert part in str(found)


def test_pickled_arrays_are_not_opened(module: Module, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert isinstance(refusal(module, f"tokens={path}"), UnsafeInputError)


def test_missing_files_and_contradictions(module: Module, tmp_path: Path) -> None:
    assert "no such file" in str(refusal(module, f"tokens={tmp_path / 'none.npy'}"))
    assert "exclude each other" in str(refusal(module, f"tokens={tmp_path / 'a.npy'} text={tmp_path / 'a.txt'}"))
    assert "tokenizer.json" in str(refusal(module, "sequences=4"))


def test_an_empty_text(with_tokenizer: Module, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("")
    assert "the calibration text is empty" in str(refusal(with_tokenizer, f"text={path}"))
    assert "no such text file" in str(refusal(with_tokenizer, f"text={tmp_path / 'none.txt'}"))


def test_a_weight_that_is_no_number_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    (broken,) = (name for name in tensors if "layers.1." in name and name.endswith("gate.weight"))
    tensors[broken][2, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = write_tokens(tmp_path / "tokens.json", random_sequences([16]))
    found = refusal(raised(tmp_path), f"tokens={tokens}")
    assert isinstance(found, UnsafeInputError)
    assert "model.layers.1.mlp.gate.weight" in str(found)


def test_the_seed_picks_windows_and_the_texts_that_come_along_are_read(with_tokenizer: Module) -> None:
    def read(seed: int, sequences: int = 8) -> list[list[int]]:
        data = read_data(with_tokenizer, texts=(), tokens=None, sequences=sequences, length=32, seed=seed)
        assert data.available > 1500
        assert all(len(sequence) == 32 for sequence in data.sequences)
        return [sequence.tolist() for sequence in data.sequences]

    assert read(0) == read(0)
    assert read(0) != read(1)
    everything = read(0, 10**6)
    assert all(sequence in everything for sequence in read(3))
    assert [everything.index(sequence) for sequence in read(3)] == sorted(everything.index(s) for s in read(3))


def test_sequences_of_a_file_keep_their_ends(module: Module, tmp_path: Path) -> None:
    def lengths(content: object, length: int) -> list[int]:
        path = tmp_path / "tokens.json"
        path.write_text(json.dumps(content))
        data = read_data(module, texts=(), tokens=path, sequences=100, length=length, seed=0)
        return [len(sequence) for sequence in data.sequences]

    assert lengths([[5] * 3, [6] * 9, []], 4) == [3, 4, 4]
    assert lengths([5] * 9, 4) == [4, 4]
    array = tmp_path / "tokens.npy"
    np.save(array, np.full((3, 5), 7, np.int32))
    data = read_data(module, texts=(), tokens=array, sequences=2, length=8, seed=0)
    assert [sequence.tolist() for sequence in data.sequences] == [[7] * 5] * 2


def test_text_files_by_name(with_tokenizer: Module) -> None:
    paths = (TEXTS / "kjv.calibration.txt", TEXTS / "shakespeare.calibration.txt")
    named = read_data(with_tokenizer, texts=paths, tokens=None, sequences=64, length=16, seed=5)
    bundled = read_data(with_tokenizer, texts=(), tokens=None, sequences=64, length=16, seed=5)
    assert named.digest == bundled.digest
    one = read_data(with_tokenizer, texts=paths[:1], tokens=None, sequences=64, length=16, seed=5)
    assert one.digest != bundled.digest


def test_a_pass_that_needs_statistics_says_what_to_run() -> None:
    from moec.pipeline.base import PassContext

    with pytest.raises(UsageError, match="not calibrated"):
        PassContext().require_calibration()
