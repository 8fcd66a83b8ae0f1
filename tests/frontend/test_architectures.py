"""Every decoder with experts that transformers has: what docs/architectures.md says of it is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from moec.frontend.huggingface import load_huggingface
from moec.reference.executor import Executor
from tests.frontend.architectures import BOUND, DENSE_MODEL_TYPES, MODEL_TYPES, load_and_compare
from tests.frontend.tiny_models import random_tokens, randomise

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def _rows() -> dict[str, tuple[str, str]]:
    """(status, remark) by model type."""
    cells = re.findall(r"^\| (\w+) \| \w+ \| (ok|refused) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {model_type: (status, remark) for model_type, status, remark in cells}


def test_the_table_is_complete() -> None:
    rows = _rows()
    assert sorted(rows) == sorted(MODEL_TYPES)
    assert sum(status == "ok" for status, _ in rows.values()) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_table_is_true(model_type: str, tmp_path: Path) -> None:
    status, remark = _rows()[model_type]
    outcome = load_and_compare(model_type, tmp_path)
    assert outcome.row().endswith(f"| {status} | {remark} |")
    assert outcome.error <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DENSE_MODEL_TYPES)
def test_dense_decoders(model_type: str, tmp_path: Path) -> None:
    outcome = load_and_compare(model_type, tmp_path)
    assert (outcome.refusal, outcome.expert_layers) == ("", 0)
    assert outcome.operations > 100
    assert outcome.error <= BOUND


ENCODERS = {
    "bert": AutoModelForMaskedLM,
    "roberta": AutoModel,
    "electra": AutoModel,
    "modernbert": AutoModel,
    "mpnet": AutoModel,
    "deberta-v2": AutoModel,
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders(model_type: str, tmp_path: Path) -> None:
    """Hidden states on a right-padded batch; a head of the checkpoint is accounted for as unused."""
    defaults = AutoConfig.for_model(model_type).to_dict()
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "embedding_size": 64,
        "vocab_size": 96,
    }
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "local_attention": 8}
    config = AutoConfig.for_model(model_type, **{name: size for name, size in sizes.items() if name in defaults})
    model = ENCODERS[model_type].from_config(config, dtype=torch.float32).eval()
    randomise(model)
    model.save_pretrained(str(tmp_path))
    module = load_huggingface(tmp_path)
    facts = module.source
    assert facts.tensors_used + len(facts.tensors_unused) == facts.tensors_total
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 15:] = 0
    ids = torch.where(mask == 1, random_tokens(2, 20), 0)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    given = {name: value for name, value in given.items() if name in module.main.arg_names}
    with torch.no_grad():
        (found,) = Executor(module.op, module.weights).run(given).values()
        expected = model.base_model(**given).last_hidden_state
    kept = mask.bool()
    assert (found - expected)[kept].abs().max() <= BOUND * expected[kept].abs().max()
