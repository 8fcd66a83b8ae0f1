"""The examples do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
TEXTS = Path(__file__).parents[2] / "moec" / "calibration" / "texts"


def test_training_script_makes_a_model_that_moec_compiles(tmp_path: Path) -> None:
    model = tmp_path / "model"
    command = [sys.executable, str(EXAMPLES / "train_tiny_moe.py"), "--steps", "2", "--vocabulary", "300"]
    command += ["--text", str(TEXTS / "kjv.calibration.txt"), "--heldout", str(DATA / "shakespeare.heldout.txt")]
    done = subprocess.run([*command, "-o", str(model)], capture_output=True, text=True, check=True)
    found = re.search(r"4096 tokens seen; held-out loss (\d\.\d+) nats per token", done.stdout)
    assert found is not None, done.stdout
    assert float(found.group(1)) < 7.0
    compiling = [sys.executable, "-m", "moec", "compile", str(model), "-o", str(tmp_path / "out")]
    compiled = subprocess.run(compiling, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    assert "4 of 4 layers with experts" in compiled.stdout


def test_imbalance_is_one_when_even_and_grows_when_a_layer_collapses() -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import torch
        from train_tiny_moe import imbalance
    finally:
        sys.path.remove(str(EXAMPLES))
    even = torch.eye(4).repeat(8, 1) * 1e-3
    collapsed = torch.tensor([9.0, 5.0, 0.0, 0.0]).repeat(32, 1)
    assert imbalance((even,), 1).item() == pytest.approx(1.0, abs=1e-3)
    assert imbalance((collapsed,), 1).item() > 3.5
    assert imbalance((even, collapsed), 1).item() == pytest.approx(2.5, abs=0.3)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "demo.sh"), str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    losses = dict(re.findall(r"kjv\.heldout\.txt\s+(source|artifact)\s+18,176\s+(\d\.\d+)", done.stdout))
    assert losses == {"source": "3.7066", "artifact": "3.7066"}
    assert "artifact through its cache against IR" in done.stdout
    assert (tmp_path / "demo" / "report.html").is_file()
