"""Checkpoint folders: the index against the shards, links, pickle, and what lies beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moec.errors import MoecError, UnsafeInputError, UsageError
from moec.weights.checkpoint import Checkpoint, resolve_member
from tests.weights.files import save_shards

A, B = {"a": torch.arange(4.0)}, {"b": torch.arange(6.0)}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    save_shards(tmp_path, {ONE: A, TWO: B})
    checkpoint = Checkpoint.open(str(tmp_path))
    assert sorted(checkpoint) == ["a", "b"] and len(checkpoint) == 2 and "a" in checkpoint
    assert torch.equal(checkpoint.read("b"), B["b"])
    assert checkpoint.nbytes == 40
    assert [path.name for path in checkpoint.files] == [ONE, TWO]
    assert checkpoint.file_digests()[ONE] == hashlib.sha256((tmp_path / ONE).read_bytes()).hexdigest()
    location = checkpoint.location("a")
    assert (tmp_path / ONE).read_bytes()[location.offset :][: location.nbytes] == A["a"].numpy().tobytes()


def test_digest_follows_content_not_names_or_files(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_shards(tmp_path / "one", {ONE: A, TWO: B})
    save_file({"x": A["a"], "y": A["a"] + 1, "z": A["a"].reshape(2, 2).clone()}, tmp_path / "two" / "model.safetensors")
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    assert one.digest("a") == two.digest("x")
    assert len({two.digest(name) for name in "xyz"}) == 3


def _index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


BAD_SHARD_NAMES = [
    "../outside.safetensors",
    "/tmp/outside.safetensors",
    "a/../../outside.safetensors",
    "sub/model.safetensors",
    "..\\outside.safetensors",
    "..",
    "",
    "model.bin",
    "a\0.safetensors",
    "C:model.safetensors",
    None,
    3,
    ["x.safetensors"],
]


@pytest.mark.parametrize("shard", BAD_SHARD_NAMES, ids=repr)
def test_index_must_name_files_of_the_folder(shard: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(A, tmp_path / "outside.safetensors")
    _index(folder, {"a": shard})
    with pytest.raises(UnsafeInputError, match="tensor a") as caught:
        Checkpoint.open(folder)
    assert INDEX in caught.value.where


def test_missing_shard_is_named(tmp_path: Path) -> None:
    save_shards(tmp_path, {ONE: A, TWO: B})
    (tmp_path / TWO).unlink()
    with pytest.raises(UnsafeInputError, match=TWO):
        Checkpoint.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_shards(tmp_path, {ONE: {**A, "c": torch.zeros(1)}, TWO: {**A, **B}})
    with pytest.raises(UnsafeInputError, match="tensor a is in two shards"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": ONE, "b": TWO, "c": ONE}, "c is in the index but not"),
        ({"a": ONE, "b": ONE}, "b is in the index but not"),
        ({"a": TWO, "b": ONE}, "index puts tensor a into"),
        ({"b": TWO, "c": ONE}, "a is in shard .* but not in the index"),
    ],
)
def test_index_and_shards_disagree(index: dict[str, str], message: str, tmp_path: Path) -> None:
    save_shards(tmp_path, {ONE: A, TWO: B}, index)
    with pytest.raises(UnsafeInputError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "x", "a": "y"}}', "\xff"],
)
def test_malformed_index(text: str, tmp_path: Path) -> None:
    save_file(A, tmp_path / ONE)
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(UnsafeInputError) as caught:
        Checkpoint.open(tmp_path)
    assert INDEX in caught.value.where


def test_cut_last_shard(tmp_path: Path) -> None:
    save_shards(tmp_path, {ONE: A, TWO: B})
    os.truncate(tmp_path / TWO, (tmp_path / TWO).stat().st_size - 1)
    with pytest.raises(UnsafeInputError, match="cut") as caught:
        Checkpoint.open(tmp_path)
    assert TWO in caught.value.where


def test_single_file_and_index_of_others_contradict(tmp_path: Path) -> None:
    save_shards(tmp_path, {ONE: A, TWO: B})
    save_file(A, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeInputError, match="both"):
        Checkpoint.open(tmp_path)


def test_pickle_beside_safetensors_is_never_touched(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even pickle")
    assert list(Checkpoint.open(tmp_path)) == ["a"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickle_only_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeInputError, match="pickle") as caught:
        Checkpoint.open(tmp_path)
    assert name in caught.value.message and caught.value.exit_code == 6


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights"):
        Checkpoint.open(tmp_path)
    for name in ("one", "two"):
        save_file(A, tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="neither"):
        Checkpoint.open(tmp_path)


def test_one_safetensors_file_of_any_name(tmp_path: Path) -> None:
    save_file(A, tmp_path / "weights of é.safetensors")
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), A["a"])


def _outside(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(A, tmp_path / "outside.safetensors")
    return folder, tmp_path / "outside.safetensors"


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["symlink", "broken link", "hard link", "FIFO", "folder", "device"])
def test_shard_that_is_not_a_file_of_its_own(kind: str, sharded: bool, tmp_path: Path) -> None:
    folder, outside = _outside(tmp_path)
    path = folder / (ONE if sharded else "model.safetensors")
    if sharded:
        _index(folder, {"a": ONE})
    if kind == "symlink":
        path.symlink_to(outside)
    elif kind == "broken link":
        path.symlink_to("nothing.safetensors")
    elif kind == "hard link":
        path.hardlink_to(outside)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UnsafeInputError) as caught:
        Checkpoint.open(folder)
    assert str(path) in caught.value.where


def test_linked_index_is_refused(tmp_path: Path) -> None:
    folder, _ = _outside(tmp_path)
    save_file(A, folder / ONE)
    _index(tmp_path, {"a": ONE})
    (folder / INDEX).symlink_to(tmp_path / INDEX)
    with pytest.raises(UnsafeInputError, match="link"):
        Checkpoint.open(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(A, blobs / "5f2c")
    (blobs / "77aa").write_text(json.dumps({"weight_map": {"a": ONE}}))
    (snapshot / ONE).symlink_to("../../blobs/5f2c")
    (snapshot / INDEX).symlink_to("../../blobs/77aa")
    assert torch.equal(Checkpoint.open(snapshot).read("a"), A["a"])
    (snapshot / ONE).unlink()
    (snapshot / ONE).symlink_to("../../../outside.safetensors")
    save_file(A, tmp_path / "outside.safetensors")
    with pytest.raises(UnsafeInputError, match="outside"):
        Checkpoint.open(snapshot)


def test_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    save_file(A, tmp_path / "real.safetensors")
    (tmp_path / "model.safetensors").symlink_to("real.safetensors")
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), A["a"])


def test_unknown_tensor_suggests_the_nearest(tmp_path: Path) -> None:
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"did you mean model\.layers\.0\.weight"):
        Checkpoint.open(tmp_path).read("model.layer.0.weight")


def test_resolve_member_of_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        resolve_member(tmp_path, "absent")


def test_errors_are_one_paragraph_with_exit_codes() -> None:
    error = UnsafeInputError("bad\nthing", where="file x", hint="do y")
    assert str(error) == "bad thing. Where: file x. What to do: do y."
    assert isinstance(error, MoecError) and error.exit_code == 6
    assert str(MoecError("only this")) == "only this."
