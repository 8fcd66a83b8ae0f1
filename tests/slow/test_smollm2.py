"""SmolLM2-135M: perplexities through the cache, and the tokens that ONNX Runtime GenAI generates."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from moec.artifact.compilation import compile_folder
from moec.artifact.options import CompileOptions
from tests.parity.onnx_session import OnnxSession
from tests.slow.packages import smollm2_folder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]

WINDOWS, LENGTH, PREFILL = 8, 256, 128
# Measured with transformers in float32 on the same tokens.
PERPLEXITIES = {"pydoc": 12.87, "kjv": 13.43}
TEXTS = Path(__file__).parent / "data"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def source() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module", params=["portable", "ort-cpu"])
def artifact(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("smollm2")
    result = compile_folder(source, root / request.param, CompileOptions(target=request.param))
    assert result.manifest.verification.status == "passed"
    yield result.folder
    shutil.rmtree(root)


@pytest.mark.parametrize("text", PERPLEXITIES)
def test_perplexity_through_the_cache(artifact: Path, text: str) -> None:
    """Each of the tokens of 8 windows predicts the next one of the text: half of a window at once, then one by one."""
    codec = Tokenizer.from_file(str(artifact / "onnx" / "tokenizer.json"))
    content = (TEXTS / f"{text}.txt").read_text(encoding="utf-8")
    tokens = np.asarray(codec.encode(content, add_special_tokens=False).ids[: WINDOWS * LENGTH + 1])
    ids, targets = tokens[:-1].reshape(WINDOWS, LENGTH), tokens[1:].reshape(WINDOWS, LENGTH)
    session = OnnxSession.load(artifact / "onnx" / "model.onnx")
    logits = torch.from_numpy(session.decode(ids, np.ones_like(ids), first=PREFILL)).double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    assert math.exp(loss.item()) == pytest.approx(PERPLEXITIES[text], abs=0.006)


def test_genai_generates_the_tokens_of_transformers(artifact: Path, source: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="the extra `genai` is not installed")
    codec = Tokenizer.from_file(str(source / "tokenizer.json"))
    prompt, count = codec.encode(PROMPT).ids, 24
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0].tolist()
    loaded = genai.Model(str(artifact / "onnx"))
    assert genai.Tokenizer(loaded).encode(PROMPT).tolist() == prompt
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[: len(expected)] == expected
    assert "Paris" in codec.decode(expected)


def test_configuration_for_genai(artifact: Path) -> None:
    config = json.loads((artifact / "onnx" / "genai_config.json").read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 30
    assert (artifact / "onnx" / "chat_template.jinja").is_file()
