"""The commands on a real artifact: what they print, what they write, what they find."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from moec.artifact.manifest import check_files, read_manifest
from moec.artifact.opened import Artifact
from moec.artifact.report import read_report
from tests.cli.conftest import DEMO_MODEL, HELDOUT, Command

pytestmark = pytest.mark.xdist_group("artifact")


def test_artifact_folder_is_complete_and_says_nothing_of_paths(compiled: Path) -> None:
    names = {path.relative_to(compiled).as_posix() for path in compiled.rglob("*") if path.is_file()}
    assert {"moec.json", "measurements.json", "module.mlir", "report.html", "report.json"} <= names
    assert {"onnx/model.onnx", "onnx/model.onnx.data", "onnx/tokenizer.json", "onnx/generation_config.json"} <= names
    manifest = read_manifest(compiled)
    check_files(compiled, manifest)
    source = Artifact.open(compiled).measurements.source
    for name in names - {"measurements.json"}:
        data = (compiled / name).read_bytes()
        assert source.encode() not in data, name
        assert b"site-packages" not in data, name
    assert manifest.source.architecture == "MixtralForCausalLM"
    assert manifest.source.parameters == 3_085_440
    assert set(manifest.source.files) >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_ledger_has_one_line_per_pass_and_every_claim_was_checked(compiled: Path) -> None:
    manifest = read_manifest(compiled)
    assert ",".join(entry.pass_text for entry in manifest.ledger) == manifest.build.pipeline
    assert {entry.outcome.value for entry in manifest.ledger} == {"within bound", "unchanged"}
    assert {entry.after.parameters for entry in manifest.ledger} == {3_085_440}
    assert manifest.ledger[-1].after.active_flops == 2_629_632
    assert manifest.ledger[-1].after.operations < manifest.ledger[0].before.operations


def test_report_shows_every_layer_and_expert(compiled: Path) -> None:
    report = read_report(compiled)
    moe = [layer for layer in report.layers if layer.classes]
    assert [layer.name for layer in moe] == [f"model.layers.{index}" for index in range(4)]
    assert all(layer.classes[0].width == 192 and layer.classes[0].body == "SwiGLU" for layer in moe)
    assert sum(layer.total_bytes for layer in report.layers) == 3_085_440 * 4
    page = (compiled / "report.html").read_text()
    assert len(re.findall(r"<title>model\.layers\.\d, expert \d", page)) == 32


def test_model_runs_in_plain_onnxruntime(compiled: Path) -> None:
    session = onnxruntime.InferenceSession(str(compiled / "onnx" / "model.onnx"))
    feed = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    feed |= {"position_ids": np.array([[0, 1, 2]])}
    names = {item.name for item in session.get_inputs()}
    empty = {name: np.zeros((1, 2, 0, 32), np.float32) for name in names if name.startswith("past")}
    logits = session.run(["logits"], {**{name: feed[name] for name in names & set(feed)}, **empty})[0]
    assert logits.shape == (1, 3, 4096)
    assert len(empty) == 8


def test_verify_passes(moec: Command, compiled: Path) -> None:
    code, out, _ = moec("verify", compiled)
    assert code == 0
    assert "router choices, IR against source" in out
    assert "artifact through its cache against IR" in out


def test_eval_agrees_with_the_source(moec: Command, artifact: Path) -> None:
    code, out, _ = moec(
        "eval", artifact, "--text", HELDOUT, "--tokens", 512, "--window", 64, "--chunk", 24, "--compare", "--json"
    )
    assert code == 0
    found = json.loads(out)
    source, compiled = found["losses"]
    assert (source["subject"], compiled["subject"]) == ("source", "artifact")
    assert compiled["tokens"] == 512
    assert compiled["nats_per_token"] == pytest.approx(source["nats_per_token"], rel=1e-5)
    assert 0 < compiled["nats_per_byte"] < compiled["nats_per_token"]
    assert [row["agreement"] for row in found["routers"]] == [1.0] * 4, "nothing was changed"
    assert all(expert["relative_error"] < 1e-5 for row in found["routers"] for expert in row["experts"])
    assert sum(expert["tokens"] for expert in found["routers"][0]["experts"]) == 2 * 512
    assert found["stored"]["bits_per_weight"] == pytest.approx(32, rel=0.1)
    assert found["stored"]["expert_bits_per_weight"] == 32
    assert [row.subject for row in read_report(artifact).losses] == ["source", "artifact"]
    assert read_report(artifact).comparison is not None
    assert "<h2>Against the source" in (artifact / "report.html").read_text()
    assert "<h2>Losses" in (artifact / "report.html").read_text()
    assert moec("verify", artifact)[0] == 0, "measurements are outside of the digests"


@pytest.mark.slow
def test_eval_of_one_text_is_one_object(moec: Command, compiled: Path) -> None:
    code, out, _ = moec("eval", DEMO_MODEL, "--text", HELDOUT, "--tokens", 256, "--json")
    assert code == 0
    assert json.loads(out)["nats_per_token"] == pytest.approx(3.5, abs=0.8)


def test_run_generates_the_same_alone_and_in_a_batch(moec: Command, compiled: Path) -> None:
    prompts = ["In the beginning God", "KING HENRY."]
    rows = []
    for prompt in prompts:
        code, out, _ = moec("run", compiled, "-p", prompt, "--max-new-tokens", 12, "--json")
        assert code == 0
        rows += json.loads(out)
    code, out, _ = moec("run", compiled, "-p", prompts[0], "-p", prompts[1], "--max-new-tokens", 12, "--json")
    assert json.loads(out) == rows
    assert all(len(row["tokens"]) == 12 for row in rows)


def test_sampling_is_repeatable(moec: Command, compiled: Path) -> None:
    def sample(seed: int) -> str:
        arguments = ("run", compiled, "-p", "And", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", seed)
        return moec(*arguments)[1]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_run_needs_a_prompt(moec: Command, compiled: Path) -> None:
    assert moec("run", compiled)[0] == 2
    code, _, err = moec("run", DEMO_MODEL, "-p", "x")
    assert code == 2
    assert "not an artifact" in err


def test_inspect_shows_the_same_layers_for_source_and_artifact(moec: Command, compiled: Path) -> None:
    _, artifact_text, _ = moec("inspect", compiled)
    code, source_text, _ = moec("inspect", DEMO_MODEL)
    assert code == 0
    assert artifact_text.split("\n\n")[1] == source_text.split("\n\n")[1]
    assert "126 of 126 checkpoint tensors used" in source_text
    facts = json.loads(moec("inspect", compiled, "--json")[1])
    assert facts["manifest"]["build"]["target"] == "portable"


@pytest.mark.slow
def test_inspect_lists_experts_and_how_often_they_are_chosen(moec: Command, compiled: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 60)
    code, out, _ = moec("inspect", DEMO_MODEL, "--calibration", text)
    assert code == 0
    assert "gate mass" in out and len(re.findall(r"%", out)) == 4 * 8 * 2
    layers = json.loads(moec("inspect", DEMO_MODEL, "--calibration", text, "--json")[1])["layers"]
    for layer in layers[:4]:
        # each token chose two experts, and its gates add up to 1
        assert sum(layer["use"]["chosen"]) == 2 * layer["use"]["tokens"] > 0
        assert sum(layer["use"]["gate_mass"]) == pytest.approx(layer["use"]["tokens"], rel=1e-3)
    assert "gate mass" not in moec("inspect", compiled)[1]
    assert "SwiGLU    192  7" in moec("inspect", compiled)[1]
    assert "SwiGLU    192  7" not in moec("inspect", compiled, "--no-experts")[1]
    code, _, err = moec("inspect", compiled, "--calibration", text)
    assert code == 2 and "not calibrated again" in err


def test_plan_is_near_what_the_compilation_took(moec: Command, compiled: Path) -> None:
    code, out, _ = moec("plan", DEMO_MODEL, "--json")
    assert code == 0
    plan = json.loads(out)
    measured = Artifact.open(compiled).measurements
    assert plan["cost"] == measured.predicted.model_dump()
    assert plan["parameters"] == 3_085_440
    assert (plan["layers"], plan["experts"]) == (4, 32)
    assert plan["cost"]["disk_bytes"] == pytest.approx(measured.actual.disk_bytes, rel=0.1)


@pytest.mark.parametrize(("budget", "least"), [("50%", 7_600_000), ("8MB", 7_900_000)])
def test_plan_counts_with_the_budget(moec: Command, budget: str, least: int) -> None:
    code, out, _ = moec("plan", DEMO_MODEL, "--json", "--budget", budget)
    whole = json.loads(moec("plan", DEMO_MODEL, "--json")[1])["cost"]["disk_bytes"]
    disk = json.loads(out)["cost"]["disk_bytes"]
    assert code == 0 and least < disk < least + 1_000_000 < whole


def test_plan_needs_no_weights(moec: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO_MODEL / "config.json").read_text())
    code, out, _ = moec("plan", tmp_path)
    assert code == 0
    assert "3,085,440" in out


def test_bench_reports_bounds_and_updates_the_report(moec: Command, artifact: Path) -> None:
    short = ("--prefill", 16, "--decode", 3, "--rounds", 1, "--seed", 3, "--json")
    code, out, _ = moec("bench", artifact, *short, "--beside", artifact / "onnx" / "model.onnx")
    assert code == 0
    rows = json.loads(out)
    assert {row["subject"] for row in rows} == {
        "artifact (ONNX Runtime)",
        "export onnx/model.onnx",
        "transformers (eager)",
        "transformers (grouped_mm)",
    }
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert sum(row["bound_tokens_per_second"] is not None for row in rows) == 2
    assert "<h2>Speed" in (artifact / "report.html").read_text()


@pytest.mark.slow
def test_weights_in_place_are_not_written_again(moec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(DEMO_MODEL, source)
    code, _, err = moec("compile", source, "-o", out, "--weights-in-place", "--check", "none")
    assert code == 0, err
    linked = out / "onnx" / "weights-00000.safetensors"
    assert linked.samefile(source / "model.safetensors")
    assert moec("verify", out)[0] == 0, "the source can still be read"
    shutil.rmtree(tmp_path / "cache")
    code, _, err = moec("inspect", source)
    assert code == 6, "a hard link that moec did not make is refused"
    assert "hard-linked" in err


def test_float16_halves_the_file_and_is_held_to_the_same_bound(moec: Command, compiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = moec("compile", DEMO_MODEL, "-o", out, "--dtype", "float16", "--check", "none")
    assert code == 0, err
    assert "artifact against IR with weights in float16" in text
    rows = Artifact.open(out).measurements.verification
    assert all(row.relative_difference <= row.bound <= 1e-4 for row in rows)
    sizes = [(folder / "onnx" / "model.onnx.data").stat().st_size for folder in (out, compiled)]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.01)
    assert read_manifest(out).ledger[0].outcome.value in ("not checked", "unchanged")
