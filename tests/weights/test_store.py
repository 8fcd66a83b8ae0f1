"""The store: equal content is one file, changed files are noticed, nothing half-written is ever there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moec.errors import ResourceError, UsageError, VerificationError
from moec.weights.context import WeightContext
from moec.weights.expression import Stored
from moec.weights.store import WeightStore, Work
from moec.weights.tensor_spec import TensorSpec, content_digest

WORK = Work(inputs=("abc", "def"), pass_name="prune", options="keep=4", code_version="0.1.0", seed=7)


def _objects(store: WeightStore) -> list[Path]:
    return sorted((store.folder / "objects").rglob("*.safetensors"))


def test_put_and_read(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "store")
    tensor = torch.randn(5, 3, 2).to(torch.bfloat16)
    stored = store.put(tensor)
    assert stored.digest == content_digest(tensor)
    assert stored in store and Stored("0" * 64) not in store
    assert torch.equal(store.read(stored), tensor)
    assert torch.equal(store.read(stored, (range(1, 5, 2), range(3), range(1))), tensor[1:5:2, :, :1])
    assert torch.equal(load_file(_objects(store)[0])["tensor"], tensor)
    assert list((store.folder / "temporary").iterdir()) == []


def test_equal_content_is_one_file_and_layout_does_not_matter(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    tensor = torch.arange(12.0).reshape(3, 4)
    assert store.put(tensor.T.contiguous().T) == store.put(tensor)
    assert len(_objects(store)) == 1
    others = [tensor.reshape(4, 3), tensor.view(torch.int32), tensor + 1, tensor.double()]
    assert len({store.put(other).digest for other in others}) == 4 and len(_objects(store)) == 5


def test_a_tensor_that_another_store_on_the_folder_writes_again_stays_readable(tmp_path: Path) -> None:
    tensor = torch.randn(3, 4)
    first, second = WeightStore(tmp_path), WeightStore(tmp_path)
    stored = first.put(tensor)
    assert torch.equal(first.read(stored), tensor)
    time.sleep(0.01)
    assert second.put(tensor) == stored
    assert torch.equal(first.read(stored), tensor)


def test_parts_make_the_same_file_as_the_whole(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    tensor = torch.randn(10, 3)
    spec = TensorSpec((10, 3), torch.float32)
    assert store.put_parts(spec, (tensor[start : start + 4] for start in (0, 4, 8))) == store.put(tensor)


@pytest.mark.parametrize("parts", [[torch.zeros(3)], [torch.zeros(5)], [torch.zeros(4, dtype=torch.float64)], []])
def test_parts_that_are_not_the_tensor(parts: list[torch.Tensor], tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    with pytest.raises(UsageError):
        store.put_parts(TensorSpec((4,), torch.float32), parts)
    assert _objects(store) == [] and list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("position", [20, -1])
def test_one_changed_byte_is_noticed(position: int, tmp_path: Path) -> None:
    stored = WeightStore(tmp_path).put(torch.arange(100.0))
    path = _objects(WeightStore(tmp_path))[0]
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(VerificationError, match="changed") as caught:
        WeightStore(tmp_path).read(stored)
    assert str(path) in caught.value.where and caught.value.exit_code == 4


def test_another_tensor_under_the_digest_is_noticed(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    one, two = store.put(torch.zeros(4)), store.put(torch.ones(4))
    paths = {path.stem: path for path in _objects(store)}
    paths[two.digest].replace(paths[one.digest])
    with pytest.raises(VerificationError):
        WeightStore(tmp_path).read(one)


def test_unknown_digest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not there"):
        WeightStore(tmp_path).read(Stored("0" * 64))


def test_work_is_remembered_by_everything_that_decides_it(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    results = {"down": store.put(torch.zeros(2)), "gate_up": store.put(torch.ones(2))}
    assert store.recall(WORK) is None
    store.remember(WORK, results)
    assert WeightStore(tmp_path).recall(WORK) == results
    others = [
        Work(("abc",), "prune", "keep=4", "0.1.0", 7),
        Work(("def", "abc"), "prune", "keep=4", "0.1.0", 7),
        Work(("abc", "def"), "merge", "keep=4", "0.1.0", 7),
        Work(("abc", "def"), "prune", "keep=5", "0.1.0", 7),
        Work(("abc", "def"), "prune", "keep=4", "0.1.1", 7),
        Work(("abc", "def"), "prune", "keep=4", "0.1.0", 8),
        Work(("abc", "defprune"), "", "keep=4", "0.1.0", 7),
    ]
    assert len({WORK.key, *(work.key for work in others)}) == 8
    assert all(store.recall(work) is None for work in others)


def test_work_whose_results_are_gone_is_done_again(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    store.remember(WORK, {"a": store.put(torch.zeros(2))})
    _objects(store)[0].unlink()
    assert store.recall(WORK) is None


@pytest.mark.parametrize("text", ['{"a": "../../etc/passwd"}', '{"a": 3}'])
def test_tampered_note_of_work(text: str, tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    store.remember(WORK, {})
    next((tmp_path / "work").rglob("*.json")).write_text(text)
    with pytest.raises(VerificationError, match="not a digest"):
        store.recall(WORK)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = WeightStore(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="no space") as caught:
        store.put(torch.zeros(4))
    assert caught.value.exit_code == 5
    assert _objects(store) == [] and list((tmp_path / "temporary").iterdir()) == []


def test_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        WeightStore(tmp_path / "file").put(torch.zeros(4))


WRITER = """
import sys, torch
from moec.weights.store import WeightStore
from moec.weights.tensor_spec import TensorSpec
def parts():
    for row in range(1000):
        yield torch.full((1, 250), float(row))
        print(row, flush=True)
        if row == 500:
            sys.stdin.read()
WeightStore(sys.argv[1]).put_parts(TensorSpec((1000, 250), torch.float32), parts())
"""


def test_killed_while_writing_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    while process.stdout.readline().strip() != "500":
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = WeightStore(tmp_path)
    assert _objects(store) == []
    rows = torch.arange(1000.0)[:, None].expand(1000, 250)
    stored = store.put(rows)
    assert torch.equal(store.read(stored), rows)


def test_context_loads_stored_tensors_inside_expressions(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    tensor = torch.randn(4, 3)
    stored = store.put(tensor)
    context = WeightContext(store=store, in_memory={"bias": torch.ones(4, 3)})
    text = f"concat(1, {stored}, bias)"
    assert context.shape_dtype(text) == ((4, 6), torch.float32)
    assert torch.equal(context.load(text, 2), torch.cat([tensor[2], torch.ones(3)]))
    assert context.digest(str(stored)) == stored.digest
    location = context.location(stored)
    assert location is not None
    assert location.path.read_bytes()[location.offset :][: location.nbytes] == tensor.numpy().tobytes()


@pytest.fixture
def in_memory() -> Iterator[WeightContext]:
    module = torch.nn.Linear(3, 2)
    yield WeightContext(in_memory=module.state_dict())


def test_context_of_a_module(in_memory: WeightContext) -> None:
    assert in_memory.shape_dtype("weight") == ((2, 3), torch.float32)
    value = in_memory.load("transpose(weight, 0, 1)", 1)
    value.zero_()
    assert in_memory.load("weight").count_nonzero() == 6
    assert in_memory.location("weight") is None
    with pytest.raises(UsageError, match="did you mean weight"):
        in_memory.load("wieght")
    with pytest.raises(UsageError, match="no store"):
        in_memory.load(str(Stored("0" * 64)))


def test_context_refuses_ambiguous_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from moec.weights.checkpoint import Checkpoint

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(UsageError, match="both in memory and in the checkpoint"):
        WeightContext(checkpoint, in_memory={"weight": torch.ones(2)})
    context = WeightContext(checkpoint, in_memory={"other": torch.ones(2)})
    assert context.load("concat(0, weight, other)").tolist() == [0, 0, 1, 1]
    assert context.location("cast(weight, f32)") == checkpoint.location("weight")
    assert context.location("cast(weight, f16)") is None and context.location("other") is None
