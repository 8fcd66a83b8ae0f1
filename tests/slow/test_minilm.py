"""all-MiniLM-L6-v2: an encoder with trained weights gives the same embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from moec.artifact.compilation import compile_folder
from moec.artifact.generation import embed
from moec.artifact.options import CompileOptions
from moec.artifact.runtime import OnnxModel
from tests.parity.comparison import assert_close
from tests.parity.onnx_session import OnnxSession
from tests.slow.packages import minilm_folder

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("minilm")]

SENTENCES = ("A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell sharply today.")


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_hidden_states_and_embeddings(target: str, tmp_path: Path) -> None:
    source = minilm_folder()
    result = compile_folder(source, tmp_path / "artifact", CompileOptions(target=target))
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(source, dtype=torch.float32)(**batch).last_hidden_state.numpy()
    ids, mask, types = (batch[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids"))
    path = result.folder / "onnx" / "model.onnx"
    assert_close(OnnxSession.load(path).encode(ids, mask, types), expected, mask)
    prompts = [row[kept.astype(bool)].tolist() for row, kept in zip(ids, mask, strict=True)]
    vectors = embed(OnnxModel(path), prompts)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]
    mean = (expected * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    assert np.allclose(vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-4)
