"""Several models as one source: what they must share, what the manifest says, and that bytes are equal again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moec
from moec.artifact.manifest import read_manifest
from moec.artifact.options import CompileOptions
from moec.artifact.plan import plan_compilation
from moec.artifact.recheck import verify_folder
from moec.errors import UsageError, VerificationError
from moec.experts import FeedForward, find_moe_layers, load_expert
from moec.pipeline.base import PassContext
from tests.frontend.tiny_models import save_tiny_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny llama and two models like it with other weights."""
    folder = tmp_path_factory.mktemp("sources")
    first = save_tiny_checkpoint("llama", folder / "first")
    return [first, *[like(first, folder / name, seed) for seed, name in enumerate(("second", "third"))]]


def like(first: Path, folder: Path, seed: int) -> Path:
    shutil.copytree(first, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(first / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_are_the_sources_and_the_rest_is_their_mean(sources: list[Path], tmp_path: Path) -> None:
    for name in ("one", "again"):
        one = moec.compile(
            sources[0],
            tmp_path / name,
            others=sources[1:],
            recipe="btx",
            store=tmp_path / "store",
            check="none",
            verify=False,
        )
    tensors = [load_file(source / "model.safetensors") for source in sources]
    layer = find_moe_layers(one.module.op)[0]
    assert (layer.expert_count, layer.top_k) == (3, 2)
    for number in range(3):
        expert = load_expert(layer, one.module.weights, number)
        assert isinstance(expert, FeedForward)
        assert torch.equal(expert.down.dense(), tensors[number]["model.layers.0.mlp.down_proj.weight"].float())
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = next(op for op in one.module.op.walk() if op.attributes.get("weight_name") == name)
    mean = (tensors[0][name].float() + tensors[1][name].float() + tensors[2][name].float()) / 3
    assert torch.equal(
        one.module.weights.load(weight.attributes["source"]).float(), mean.to(tensors[0][name].dtype).float()
    )
    for file in ("moec.json", "module.mlir", "onnx/model.onnx", "onnx/model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    manifest = read_manifest(tmp_path / "one")
    digests = [manifest.source.files, *manifest.others]
    assert len({files["model.safetensors"].sha256 for files in digests}) == 3


@pytest.mark.slow
def test_an_artifact_of_several_sources_is_verified_against_all(sources: list[Path], tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(sources[1], second)
    moec.compile(sources[0], tmp_path / "out", others=[second], recipe="btx", store=tmp_path / "store", verify=False)
    assert verify_folder(tmp_path / "out", store=tmp_path / "store")
    with pytest.raises(UsageError, match="with 1 models beside its source, not 2"):
        verify_folder(tmp_path / "out", others=sources[1:], store=tmp_path / "store")
    with pytest.raises(VerificationError, match=r"model\.safetensors differs"):
        verify_folder(tmp_path / "out", others=sources[2:], store=tmp_path / "store")
    second.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="a model beside the source of the artifact is not there"):
        verify_folder(tmp_path / "out", store=tmp_path / "store")
    assert verify_folder(tmp_path / "out", others=[tmp_path / "moved"], store=tmp_path / "store")


@pytest.mark.slow
def test_weights_in_place_lie_in_all_sources(sources: list[Path], tmp_path: Path) -> None:
    result = moec.compile(
        sources[0],
        tmp_path / "out",
        others=sources[1:],
        pipeline="upcycle{sources=all}",
        store=tmp_path / "store",
        weights_in_place=True,
        check="none",
        verify=False,
    )
    assert len(list((result.folder / "onnx").glob("weights-*.safetensors"))) >= 3


def test_a_plan_counts_all_models(sources: list[Path]) -> None:
    alone = plan_compilation(sources[0], CompileOptions())
    together = plan_compilation(sources[0], CompileOptions(others=tuple(sources[1:])))
    assert together.parameters == alone.parameters
    assert together.cost.disk_bytes > 2 * alone.cost.disk_bytes - 1_000_000


def rewrite(name: str, change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return apply


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_half(folder: Path) -> None:
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_token(values: dict[str, object]) -> None:
    values["model"] = {"type": "WordLevel", "vocab": {"a": 0, "c": 1}}


BAD = [
    (rewrite("config.json", lambda values: values.update(intermediate_size=48)), "differ in intermediate_size: "),
    (rewrite("config.json", lambda values: values.update(rms_norm_eps=1e-3)), "differ in rms_norm_eps: "),
    (without_a_tensor, r"the tensor model\.norm\.weight: .* in the first one, not there here"),
    (in_half, r"the tensor \S+: .*, f(loat)?16"),
    (rewrite("tokenizer.json", other_token), r"tokenizers of the models differ in model\.vocab\.b, which only one"),
    (lambda folder: (folder / "tokenizer.json").unlink(), r"only one of the models has tokenizer\.json"),
    (lambda folder: (folder / "config.json").unlink(), r"there is no config\.json"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_sources_that_do_not_fit_are_refused_with_what_differs(
    sources: list[Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for source, folder in zip(sources[:2], (first, other), strict=True):
        shutil.copytree(source, folder)
        vocabulary = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    damage(other)
    with pytest.raises(UsageError, match=message):
        moec.load(first, others=[other])


def test_one_model_alone_cannot_be_joined() -> None:
    with pytest.raises(UsageError, match="joins several models, but there is only one"):
        PassContext().require_others()


def test_the_command_line_names_the_field_in_which_models_differ(
    sources: list[Path], tmp_path: Path, moec_command: Callable[..., tuple[int, str, str]]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(sources[1], other)
    rewrite("config.json", lambda values: values.update(num_hidden_layers=3))(other)
    for command in ("plan", "compile"):
        target = ("-o", tmp_path / "out") if command == "compile" else ()
        code, _, printed = moec_command(command, sources[0], *target, "--with", sources[1], "--with", other)
        assert code == 2 and "the models differ in" in printed and str(other / "config.json") in printed
    code, printed, _ = moec_command("plan", sources[0], "--with", sources[1], "--recipe", "btx")
    assert code == 0 and "parameters" in printed
