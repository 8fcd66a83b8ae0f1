"""The raising pipeline and the cache on models of transformers: what is recognised, and that it computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moec.artifact.options import DECODER_PIPELINE, RAISING_PIPELINE
from moec.dialects.nn import AttentionOp
from moec.module import Module
from moec.reference.executor import Executor
from tests.frontend.tiny_models import MIXTURE_MODEL_TYPES, TINY_MODELS
from tests.passes.raising import LENGTH, apply, compute, load_tiny, relative_error


@dataclass(frozen=True)
class Expected:
    """How many operations of each kind there must be."""

    layers: int = 2
    rms_norms: int = 0
    layer_norms: int = 0
    rotary: int = 0
    mlps: int = 0
    routes: int = 0


EXPECTED = {
    "llama": Expected(rms_norms=5, rotary=4, mlps=2),
    "mistral": Expected(rms_norms=5, rotary=4, mlps=2),
    "qwen2": Expected(rms_norms=5, rotary=4, mlps=2),
    "qwen3": Expected(rms_norms=9, rotary=4, mlps=2),
    "gemma2": Expected(rms_norms=9, rotary=4, mlps=2),
    "gemma3_text": Expected(layers=3, rms_norms=19, rotary=6, mlps=3),
    "gpt2": Expected(layer_norms=5, mlps=2),
    "bert": Expected(layer_norms=5, mlps=2),
    "mixtral": Expected(rms_norms=5, rotary=4, routes=2),
    "qwen2_moe": Expected(rms_norms=5, rotary=4, mlps=2, routes=2),
    "qwen3_moe": Expected(rms_norms=9, rotary=4, routes=2),
    "olmoe": Expected(rms_norms=9, rotary=4, routes=2),
    "phimoe": Expected(layer_norms=5, rotary=4, routes=2),
    "granitemoe": Expected(rms_norms=5, rotary=4, routes=2),
    "gpt_oss": Expected(rms_norms=5, rotary=4, routes=2),
    "deepseek_v2": Expected(layers=3, rms_norms=13, rotary=6, mlps=3, routes=2),
    "deepseek_v3": Expected(layers=3, rms_norms=13, rotary=6, mlps=3, routes=2),
}
# One of each way of routing and of rotating; the others run with the slow tests.
QUICK = ("gemma3_text", "gpt2", "bert", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3")
MODELS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY_MODELS]
# Left over where a router, a norm or a complex number was not recognised.
TRACES = ("aten.topk.default", "aten.rsqrt.default", "aten.neg.default", "aten.polar.default", "aten.gather.default")


def decoded(module: Module, inputs: dict[str, torch.Tensor], prefill: int) -> torch.Tensor:
    """Logits of a prefill of `prefill` tokens, then of one token at a time through the cache, in float64."""
    executor = Executor(module.op, module.weights, dtype=torch.float64, keep_weights=True)
    arguments = dict(zip(module.main.arg_names, module.main.arguments, strict=True))
    batch = len(inputs["input_ids"])
    cache = {
        name: torch.zeros(batch, argument.type.shape[1], 0, argument.type.shape[3], dtype=torch.float64)
        for name, argument in arguments.items()
        if name.startswith("past_key_values.")
    }
    logits, start = [], 0
    for size in [prefill] + [1] * (LENGTH - prefill):
        stop = start + size
        given = {
            name: value[:, :stop] if name == "attention_mask" else value[:, start:stop]
            for name, value in inputs.items()
        }
        results = executor.run({**given, **cache})
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        logits.append(results["logits"])
        start = stop
    return torch.cat(logits, 1)


@pytest.mark.parametrize("model_type", MODELS)
def test_model(model_type: str, tmp_path: Path) -> None:
    module, inputs = load_tiny(model_type, tmp_path)
    expected, tokens = EXPECTED[model_type], inputs["attention_mask"].bool()
    (name, before) = next(iter(compute(module, inputs).items()))
    context = apply(module, RAISING_PIPELINE)
    counts = module.operation_counts()
    found = Expected(
        counts["nn.attention"],
        *(counts.get(kind, 0) for kind in ("nn.rms_norm", "nn.layer_norm", "nn.rotary", "nn.mlp", "moe.route")),
    )
    assert found == expected
    assert not [refusal for refusal in context.refusals if refusal.pattern.startswith("raise-")]
    assert not [trace for trace in TRACES if trace in counts]
    assert (counts.get("moe.experts", 0) > 0) == (model_type in MIXTURE_MODEL_TYPES)
    assert relative_error(compute(module, inputs)[name][tokens], before[tokens]) < 1e-9

    context = apply(module, DECODER_PIPELINE)
    if TINY_MODELS[model_type].is_encoder:
        assert any("not causal" in refusal.reason for refusal in context.refusals)
        return
    assert sum(isinstance(op, AttentionOp) and bool(op.present) for op in module.main.body) == expected.layers
    for prefill in (LENGTH, 4, 1):
        assert relative_error(decoded(module, inputs, prefill)[tokens], before[tokens]) < 1e-9
