"""`moec bench` of generated kernels beside torch's grouped_mm: what runs on a GPU, or else in torch on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.artifact import speed
from moec.artifact.compilation import compile_folder
from moec.artifact.options import Backend, Check, CompileOptions
from moec.artifact.report import read_report
from moec.artifact.speed import BenchSettings, bench_folder
from moec.artifact.speed_subjects import KERNELS
from moec.errors import UsageError
from tests.experts.models import raised_model


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel-speed")
    source = raised_model("mixtral", folder).source.folder
    options = CompileOptions(emit=(Backend.TRITON,), check=Check.NONE, verify=False, store=folder / "store")
    assert source is not None
    compile_folder(source, folder / "out", options)
    return folder / "out"


@pytest.mark.slow
def test_kernels_beside_grouped_mm(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(speed, "kernel_device", lambda: device)
    rows = bench_folder(compiled, BenchSettings(prefill=8, decode=2, rounds=1))
    assert {(row.task, row.subject) for row in rows} == {
        (task, subject)
        for task in (
            f"prefill, 8 tokens, torch.float32 on {device}",
            f"decode, one sequence, torch.float32 on {device}",
        )
        for subject in (KERNELS, "transformers (grouped_mm)")
    }
    assert all(row.tokens_per_second > 0 for row in rows)
    assert read_report(compiled).speeds == tuple(rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_kernels_alone_are_not_measured_without_a_gpu(compiled: Path) -> None:
    with pytest.raises(UsageError, match="there is none"):
        bench_folder(compiled, BenchSettings())
