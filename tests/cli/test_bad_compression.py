"""Bad input to what makes models smaller: one clear line and nothing written, or an artifact that verifies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Command
from tests.frontend.tiny_models import VOCABULARY_SIZE, tiny_model
from tests.numerics.calibrated_models import random_sequences, write_tokens

PROTECT = "calibrate,protect-super-experts{percentile=0 share=0 first=1}"
"""All experts but those that give nothing, which are 2 of 8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 8 experts: 1 is a copy of 0, 2 gives nothing but zeros, and no token ever chooses 3."""
    path = tmp_path_factory.mktemp("models")
    model = tiny_model("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=0)
    with torch.no_grad():
        for name, stack in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                stack[1] = stack[0]
                if name.endswith("down_proj"):
                    stack[2] = 0
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[3] = -100.0
    model.save_pretrained(str(path / "model"))
    write_tokens(path / "tokens.json", random_sequences([24] * 12))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "tokens", "words"),
    [
        (["--budget", "50%"], [], ("empty",)),
        (["--budget", "50%"], [[5]], ("token",)),
        (["--budget", "50%"], [[5, 10 * VOCABULARY_SIZE]], ("vocabulary",)),
        (["--pipeline", "calibrate,prune-experts{keep=1}"], None, ("a token chooses 2", "keep at least 2")),
        (["--pipeline", f"{PROTECT},solve-budget{{bytes=50%}},apply-plan"], None, ("protect fewer experts",)),
        (["--pipeline", f"{PROTECT},prune-experts{{ratio=0.5}}"], None, ("6 are protected", "keep at least 6")),
        (["--pipeline", f"{PROTECT},prune-micro-experts{{ratio=0.5}}"], None, ("protected experts",)),
        (["--pipeline", f"{PROTECT},merge-experts{{keep=4}}"], None, ("6 are protected",)),
    ],
    ids=["no tokens", "one token", "no such token", "top-k", *("protected " * 4).split()],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    moec: Command, folder: Path, tmp_path: Path, arguments: list[str], tokens: object, words: tuple[str, ...]
) -> None:
    calibration = folder / "tokens.json"
    if tokens is not None:
        calibration = tmp_path / "tokens.json"
        calibration.write_text(json.dumps(tokens))
    before = sorted(tmp_path.iterdir())
    found, out, err = moec(
        "compile", folder / "model", "-o", tmp_path / "out", "--calibration", calibration, *arguments
    )
    assert (found, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in ("What to do:", *words)), err
    assert sorted(tmp_path.iterdir()) == before


def test_a_budget_of_nothing_is_refused_with_the_minimum(moec: Command, folder: Path, tmp_path: Path) -> None:
    found, out, err = moec(
        "compile", folder / "model", "-o", tmp_path / "out", "--calibration", folder / "tokens.json", "--budget", "0%"
    )
    assert (found, out, err.count("\n")) == (2, "", 1)
    assert "the budget of 0% is below the minimum" in err and "give at least" in err
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_no_number_is_named(moec: Command, folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    tensors = load_file(folder / "model" / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts.5" in name or name.endswith("experts.down_proj"))
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found, _, err = moec(
        "compile", source, "-o", tmp_path / "out", "--calibration", folder / "tokens.json", "--budget", "50%"
    )
    assert found == 6 and "experts" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
def test_copies_zeros_and_experts_that_nobody_chooses_become_an_artifact(
    moec: Command, folder: Path, tmp_path: Path
) -> None:
    """The refit, which these tokens are too few for, is left out, and that is told."""
    out = tmp_path / "out"
    found, printed, err = moec(
        "compile", folder / "model", "-o", out, "--calibration", folder / "tokens.json", "--budget", "40%"
    )
    assert found == 0, err
    assert "plan: experts take" in printed and ", gap 0." in printed
    assert "not refitted: 288 tokens are too few, at least 2048 are needed" in printed + err
    found, printed, err = moec("verify", out)
    assert found == 0, err
