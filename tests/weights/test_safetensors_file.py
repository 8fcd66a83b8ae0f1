"""Every way in which a safetensors file can be wrong is refused, by file and tensor, with the right exit code."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moec.errors import MoecError, UnsafeInputError, UnsupportedModelError, UsageError
from moec.weights.checkpoint import Checkpoint
from moec.weights.safetensors_file import read_header
from moec.weights.tensor_spec import SAFETENSORS_TO_DTYPE
from tests.weights.files import ENTRY, file_bytes, one_tensor, save_shards

TWO = {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}

MALFORMED = {
    "empty file": (b"", "too few"),
    "seven bytes": (bytes(7), "too few"),
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "more than"),
    "header of 200 MB": ((200_000_000).to_bytes(8, "little") + b"{}", "more than"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "has only"),
    "header empty": (file_bytes(b""), "start with"),
    "header not JSON": (file_bytes(b"{nonsense"), "parsed"),
    "header a list": (file_bytes([]), "start with"),
    "header not UTF-8": (file_bytes(b'{"\xff": 1}'), "UTF-8"),
    "leading space": (file_bytes(b" {}"), "start with"),
    "bytes after the JSON": (file_bytes(b"{} {}"), "parsed"),
    "NaN": (file_bytes(b'{"w": NaN}'), "not JSON"),
    "duplicate key": (file_bytes(b'{"w":%s,"w":%s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)), "twice"),
    "duplicate field": (file_bytes(b'{"w":{"dtype":"F32","dtype":"F32"}}'), "twice"),
    "deep nesting": (file_bytes(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested"),
    "huge number": (file_bytes(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'), "parsed"),
    "entry not an object": (file_bytes({"w": [1]}), "exactly"),
    "no offsets": (file_bytes({"w": {"dtype": "F32", "shape": [2]}}), "exactly"),
    "no shape": (file_bytes({"w": {"dtype": "F32", "data_offsets": [0, 8]}}), "exactly"),
    "extra field": (one_tensor(extra=1), "exactly"),
    "offsets past the end": (one_tensor(data=bytes(4)), "cut"),
    "offsets reversed": (one_tensor(data_offsets=[8, 0]), "reversed"),
    "offsets negative": (one_tensor(data_offsets=[-8, 0]), "data_offsets"),
    "offsets float": (one_tensor(data_offsets=[0.0, 8.0]), "data_offsets"),
    "offsets bool": (one_tensor(data_offsets=[False, 8]), "data_offsets"),
    "offsets three": (one_tensor(data_offsets=[0, 8, 8]), "data_offsets"),
    "offsets text": (one_tensor(data_offsets="08"), "data_offsets"),
    "size is not shape times type": (one_tensor(shape=[3]), "needs 12"),
    "dimension negative": (one_tensor(shape=[-2]), "non-negative"),
    "dimension float": (one_tensor(shape=[2.0]), "non-negative"),
    "dimension null": (one_tensor(shape=[None]), "non-negative"),
    "shape a number": (one_tensor(shape=2), "non-negative"),
    "dimension of 10^18": (one_tensor(shape=[10**18]), "needs"),
    "product overflows": (one_tensor(shape=[2**32, 2**32]), "more bytes"),
    "product overflows to zero": (one_tensor(shape=[2**32, 2**32, 0], data_offsets=[0, 8]), "needs 0"),
    "many dimensions": (one_tensor(shape=[1] * 65), "dimensions"),
    "dtype a number": (one_tensor(dtype=4), "text"),
    "gap": (file_bytes({**TWO, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)), "unused"),
    "gap before the first": (one_tensor(data_offsets=[4, 12], data=bytes(12)), "unused"),
    "overlap": (file_bytes({**TWO, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
    "same bytes twice": (file_bytes({**TWO, "b": ENTRY}, bytes(8)), "overlaps"),
    "trailing bytes": (one_tensor(data=bytes(9)), "follow"),
    "cut": (one_tensor(data=bytes(7)), "cut"),
    "empty name": (one_tensor(""), "empty"),
    "NUL in a name": (one_tensor("a\0b"), "control"),
    "newline in a name": (one_tensor("a\nb"), "control"),
    "line separator in a name": (one_tensor("a\u2028b"), "control"),
    "lone surrogate in a name": (file_bytes(b'{"\\ud800": %s}' % json.dumps(ENTRY).encode(), bytes(8)), "control"),
    "path in a name": (one_tensor("../../etc/x"), "path"),
    "path inside a name": (one_tensor("a/../../x"), "path"),
    "absolute name": (one_tensor("/etc/passwd"), "path"),
    "backslash in a name": (one_tensor("..\\x"), "path"),
    "name of a megabyte": (one_tensor("a" * 1_000_000), "characters"),
    "look-alike names": (
        file_bytes({"\u00e9": ENTRY, "e\u0301": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)),
        "look the same",
    ),
    "metadata a list": (file_bytes({"__metadata__": []}), "__metadata__"),
    "metadata not text": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "Git LFS",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(case: str, tmp_path: Path) -> None:
    content, expected = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsafeInputError) as caught:
        Checkpoint.open(tmp_path)
    assert expected in caught.value.message
    assert str(path) in caught.value.where
    assert caught.value.hint
    assert caught.value.exit_code == 6
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F32 ", "f32", "", "__class__"])
def test_unknown_element_type_is_unsupported(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(one_tensor("some.weight", dtype=dtype))
    with pytest.raises(UnsupportedModelError, match=r"some\.weight") as caught:
        Checkpoint.open(tmp_path)
    assert repr(dtype) in caught.value.message


def test_tensor_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(one_tensor("layers.3.w", shape=[3]))
    with pytest.raises(UnsafeInputError, match=r"tensor layers\.3\.w"):
        Checkpoint.open(tmp_path)


def _sample(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    nbytes = 3 * 5 * 4 * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    data = torch.randint(0, top, (nbytes,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(3, 5, 4)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", SAFETENSORS_TO_DTYPE.values(), ids=SAFETENSORS_TO_DTYPE)
def test_every_element_type_is_read_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = _sample(dtype)
    save_file({"before": torch.zeros(3), "weight": expected}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    whole = checkpoint.read("weight")
    assert whole.dtype == dtype and whole.shape == (3, 5, 4)
    assert torch.equal(_raw(whole), _raw(expected))
    part = checkpoint.read("weight", (range(1, 3), range(0, 5, 2), range(2, 4)))
    assert torch.equal(_raw(part), _raw(expected[1:3, ::2, 2:4]))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.5), "nothing": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("scalar").item() == 3.5
    assert checkpoint.read("nothing").shape == (0, 4)


def test_a_read_tensor_belongs_to_the_caller(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(8.0)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("weight").fill_(9)
    assert torch.equal(checkpoint.read("weight"), torch.arange(8.0))


@pytest.mark.parametrize("change", ["rewritten", "cut"])
def test_file_that_changes_after_opening_is_noticed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(8.0)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("weight")
    if change == "rewritten":
        save_file({"weight": torch.arange(8.0) + 1}, path)
    else:
        os.truncate(path, 100)
    with pytest.raises(UnsafeInputError, match="changed"):
        checkpoint.read("weight")


def test_reading_many_shards_keeps_few_files_open(tmp_path: Path) -> None:
    shards = {f"model-{k:05d}.safetensors": {f"weight.{k}": torch.full((4,), float(k))} for k in range(60)}
    save_shards(tmp_path, shards)
    checkpoint = Checkpoint.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    tensors = [checkpoint.read(f"weight.{k}") for k in range(60)]
    assert len(os.listdir("/proc/self/fd")) - before <= 20
    assert [int(tensor[0]) for tensor in tensors] == list(range(60))


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    shards = {f"model-{k:05d}.safetensors": {f"weight.{k}": torch.full((9, 1000), float(k))} for k in range(40)}
    save_shards(tmp_path, shards)
    checkpoint = Checkpoint.open(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda k: checkpoint.read(f"weight.{k % 40}"), range(400)))
    assert all(torch.equal(tensor, torch.full((9, 1000), float(k % 40))) for k, tensor in enumerate(tensors))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_escape_as_another_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(file_bytes(TWO, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 17))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flipped") / "model.safetensors"
    path.write_bytes(bytes(content))
    try:
        header = read_header(path)
    except MoecError:
        return
    assert sum(location.nbytes for location in header.tensors.values()) == 16


def test_absent_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="does not exist"):
        read_header(tmp_path / "absent.safetensors")
