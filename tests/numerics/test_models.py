"""Every tiny architecture: the module that the frontend makes, run by the executor, against transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.frontend.huggingface import load_huggingface
from moec.module import Module
from moec.reference.executor import Executor
from moec.reference.frame import ExpertsLowering
from tests.frontend.tiny_models import TINY_MODELS, random_tokens, tiny_model
from tests.numerics.language_models import inputs_of, transformers_output

BOUND = 1e-4
FAST = ("llama", "gemma2", "bert", "qwen3_moe", "gpt_oss", "deepseek_v3")
MODEL_TYPES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TINY_MODELS]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_same_output_as_transformers(model_type: str, tmp_path: Path) -> None:
    """Left-padded batches, sequences longer than the sliding window, both lowerings of the experts."""
    source = tiny_model(model_type)
    source.save_pretrained(str(tmp_path))
    module = load_huggingface(tmp_path)
    ids, mask = random_tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[1, :5], mask[2, :11] = 0, 0
    ids = torch.where(mask == 1, ids, 0)
    expected = transformers_output(source, module, ids, mask)
    kept = mask.bool()
    for lowering in ExpertsLowering if "moe.experts" in module.operation_counts() else [ExpertsLowering.GROUPED]:
        found = _run(module, inputs_of(module, ids, mask), torch.float32, lowering)
        assert (found - expected)[kept].abs().max() <= BOUND * expected[kept].abs().max()
        assert torch.equal(found[kept].argmax(-1), expected[kept].argmax(-1))
    # the row without padding also in float64, where transformers keeps float32 in its norms and softmax
    exact = _run(module, inputs_of(module, ids, mask), torch.float64, ExpertsLowering.GROUPED)
    double = transformers_output(source.double(), module, ids, mask)
    assert (exact - double)[0].abs().max() <= 1e-6 * double[0].abs().max()


def _run(module: Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype, experts: ExpertsLowering) -> torch.Tensor:
    with torch.no_grad():
        (output,) = Executor(module.op, module.weights, dtype=dtype, experts=experts).run(inputs).values()
    return output


@pytest.mark.parametrize("model_type", ["mixtral", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_zeroing_one_used_expert_moves_the_output(model_type: str, tmp_path: Path) -> None:
    """The checkpoints are random enough that a lost expert cannot hide: one percent of the largest logit."""
    source = tiny_model(model_type)
    source.save_pretrained(str(tmp_path))
    module = load_huggingface(tmp_path)
    ids = random_tokens(2, 16)
    inputs = inputs_of(module, ids, torch.ones_like(ids))
    executor = Executor(module.op, module.weights)
    stacks = [op for op in module.main.walk() if op.name == "moec.weight" and len(op.results[0].type.shape) == 3]  # type: ignore[attr-defined]
    down = stacks[1].attributes
    whole = module.weights.load(down["source"])
    moved = []
    with torch.no_grad():
        before = executor.run(inputs)["logits"]
        for expert in range(whole.shape[0]):
            without = whole.clone()
            without[expert] = 0
            after = executor.run(inputs, overrides={down["weight_name"]: without})["logits"]
            moved.append(float((after - before).abs().max() / before.abs().max()))
    assert min(moved) >= 0.01
