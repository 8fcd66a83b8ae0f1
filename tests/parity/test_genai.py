"""ONNX Runtime GenAI, which knows nothing of moec, generates the tokens that transformers generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moec.artifact.compilation import compile_folder
from moec.artifact.options import Check, CompileOptions
from tests.frontend.tiny_models import random_tokens, save_tiny_checkpoint

genai = pytest.importorskip("onnxruntime_genai", reason="the extra `genai` is not installed")

DEMO = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
COUNT = 24


def generated(folder: Path, prompts: np.ndarray) -> list[list[int]]:
    """Prompts [batch, length] with what GenAI adds to each."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = prompts.shape[1] + COUNT
    parameters.set_search_options(max_length=length, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompts.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(row))) for row in range(len(prompts))]


def expected(folder: Path, prompts: np.ndarray) -> list[list[int]]:
    """The same from transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts)
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
        )
    return output.tolist()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("demo", "portable"),
        ("qwen3_moe", "ort-cpu"),
        pytest.param("demo", "ort-cpu", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "portable", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "portable", marks=pytest.mark.slow, id="values narrower than keys"),
    ],
)
def test_greedy_tokens(name: str, target: str, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else save_tiny_checkpoint(name, tmp_path / "checkpoint")
    compile_folder(source, tmp_path / "artifact", CompileOptions(target=target, check=Check.NONE, verify=False))
    prompts = random_tokens(1, 9, seed=5).numpy()
    wanted = expected(source, prompts)
    found = generated(tmp_path / "artifact" / "onnx", prompts)
    for row, other in zip(found, wanted, strict=True):
        assert row == other[: len(row)]
        assert len(row) > prompts.shape[1] + 8
