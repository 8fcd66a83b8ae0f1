"""`moe.route` against the routers of transformers: the same gates for the same logits, every buffer random."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moec.dialects.moe import (
    ChoiceOn,
    GroupFill,
    GroupScore,
    Normalize,
    Routing,
    Score,
    Select,
    WeightFrom,
)
from moec.reference.route import RouteInputs, route

EXPERTS, TOKENS, TOP_K = 16, 200, 3
GROUPS, KEPT_GROUPS, SCALE = 4, 2, 1.7
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")

CONFIG: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), TOP_K),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), SCALE),
    "n_group": GROUPS,
    "topk_group": KEPT_GROUPS,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "moe_norm_min": 0.9,
    "moe_router_logit_softcapping": 2.5,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.0,
    "zero_expert_num": 0,
    "rms_norm_eps": 1e-6,
    "scoring_func": "sqrtsoftplus",
}

SOFTMAX = Routing(k=TOP_K)
NORMALISED = Routing(k=TOP_K, normalize=Normalize.SUM)
SELECTED = Routing(k=TOP_K, choice_on=ChoiceOn.LOGIT, weight_from=WeightFrom.SOFTMAX_SELECTED)
SIGMOID = Routing(k=TOP_K, score=Score.SIGMOID, normalize=Normalize.SUM)
SIGMOID_SCALED = Routing(k=TOP_K, score=Score.SIGMOID, normalize=Normalize.SUM, norm_eps=1e-20, scale=SCALE)
GROUP_LIMITED = Routing(
    k=TOP_K,
    score=Score.SIGMOID,
    groups=GROUPS,
    topk_groups=KEPT_GROUPS,
    group_score=GroupScore.SUM_TOP2,
    normalize=Normalize.SUM,
    norm_eps=1e-20,
    scale=SCALE,
)


@dataclass(frozen=True)
class Family:
    """A router class of transformers and what it is as `Routing`; `settings` go on top of `CONFIG`.

    passes_bias: the block around the router holds the selection bias and passes it in.
    """

    module: str
    router: str
    routing: Routing
    settings: dict[str, Any] = field(default_factory=dict)
    passes_bias: bool = False
    prepare: Callable[[Any], None] | None = None

    def __str__(self) -> str:
        changed = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.module}[{changed}]" if changed else self.module


def _without_norm(router: Any) -> None:
    router.norm = nn.Identity()
    router.scale.data.fill_(1 / router.scalar_root_size)
    router.per_expert_scale.data.copy_(torch.rand(EXPERTS) + 0.5)


FAMILIES = [
    Family("mixtral", "MixtralTopKRouter", NORMALISED),
    Family("qwen2_moe", "Qwen2MoeTopKRouter", NORMALISED),
    Family("qwen2_moe", "Qwen2MoeTopKRouter", SOFTMAX, {"norm_topk_prob": False}),
    Family("qwen3_moe", "Qwen3MoeTopKRouter", NORMALISED),
    Family("qwen3_next", "Qwen3NextTopKRouter", SOFTMAX, {"norm_topk_prob": False}),
    Family("olmoe", "OlmoeTopKRouter", SOFTMAX, {"norm_topk_prob": False}),
    Family("flex_olmo", "FlexOlmoTopKRouter", NORMALISED),
    Family("mellum", "MellumTopKRouter", NORMALISED),
    Family("minimax", "MiniMaxTopKRouter", NORMALISED),
    Family("hunyuan_v1_moe", "HunYuanMoEV1Gate", NORMALISED),
    Family("jamba", "JambaTopKRouter", SOFTMAX),
    Family("gpt_oss", "GptOssTopKRouter", SELECTED),
    Family("granitemoe", "GraniteMoeTopKRouter", SELECTED),
    Family("aria", "AriaTextTopKRouter", SELECTED),
    Family("cohere2_moe", "Cohere2MoeTopKRouter", SELECTED, {"expert_selection_fn": "softmax"}),
    Family("cohere2_moe", "Cohere2MoeTopKRouter", SIGMOID, {"expert_selection_fn": "sigmoid"}),
    Family(
        "llama4",
        "Llama4Router",
        Routing(k=TOP_K, choice_on=ChoiceOn.LOGIT, weight_from=WeightFrom.SIGMOID_LOGIT),
    ),
    Family(
        "phimoe",
        "PhimoeTopKRouter",
        Routing(k=2, select=Select.SPARSEMIXER, jitter_eps=0.01),
        {"num_experts_per_tok": 2},
    ),
    Family("deepseek_v2", "DeepseekV2TopkRouter", Routing(k=TOP_K, scale=SCALE), {"topk_method": "greedy"}),
    Family(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        Routing(k=TOP_K, groups=GROUPS, topk_groups=KEPT_GROUPS, group_fill=GroupFill.ZERO, scale=SCALE),
        {"topk_method": "group_limited_greedy"},
    ),
    Family("deepseek_v3", "DeepseekV3TopkRouter", GROUP_LIMITED),
    Family("glm4_moe", "Glm4MoeTopkRouter", GROUP_LIMITED),
    Family("dots1", "Dots1TopkRouter", GROUP_LIMITED),
    Family("exaone_moe", "ExaoneMoeTopkRouter", GROUP_LIMITED),
    Family("solar_open", "SolarOpenTopkRouter", GROUP_LIMITED),
    Family("nemotron_h", "NemotronHTopkRouter", GROUP_LIMITED),
    Family("mimo_v2_flash", "MiMoV2FlashTopkRouter", GROUP_LIMITED),
    Family("kimi_linear", "KimiLinearTopkRouter", GROUP_LIMITED),
    Family(
        "mistral4",
        "Mistral4TopkRouter",
        Routing(
            k=TOP_K,
            groups=GROUPS,
            topk_groups=KEPT_GROUPS,
            group_score=GroupScore.SUM_TOP2,
            group_fill=GroupFill.ZERO,
            normalize=Normalize.SUM,
            norm_eps=1e-20,
            scale=SCALE,
        ),
    ),
    Family("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", Routing(k=TOP_K, normalize=Normalize.SUM, norm_min=0.9)),
    Family("minimax_m2", "MiniMaxM2TopKRouter", SIGMOID, passes_bias=True),
    Family(
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        Routing(k=TOP_K, score=Score.SIGMOID, normalize=Normalize.SUM, norm_eps=1e-6, scale=SCALE),
        passes_bias=True,
    ),
    Family("afmoe", "AfmoeTokenChoiceRouter", SIGMOID_SCALED, passes_bias=True),
    Family("hy_v3", "HYV3TopKRouter", SIGMOID_SCALED, passes_bias=True),
    Family("longcat_flash", "LongcatFlashTopkRouter", Routing(k=TOP_K, scale=SCALE)),
    Family(
        "laguna",
        "LagunaTopKRouter",
        Routing(k=TOP_K, softcap=2.5, score=Score.SIGMOID, normalize=Normalize.SUM),
    ),
    Family("flint", "FlintTopKRouter", SIGMOID),
    Family(
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        Routing(k=TOP_K, score=Score.SQRT_SOFTPLUS, normalize=Normalize.SUM, norm_eps=1e-20, scale=SCALE),
    ),
    Family("gemma4", "Gemma4TextRouter", NORMALISED, prepare=_without_norm),
]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_same_gates_as_transformers(family: Family) -> None:
    torch.manual_seed(0)
    source = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    router = getattr(source, family.router)(SimpleNamespace(**{**CONFIG, **family.settings})).eval()
    logits = torch.randn(TOKENS, EXPERTS) * 2
    logit_bias, select_bias = _fill(router)
    if family.prepare is not None:
        family.prepare(router)
    if family.passes_bias:
        select_bias = torch.randn(EXPERTS) * 0.4
    # afmoe's router wants [batch, seq, hidden]
    hidden = logits[None] if family.module == "afmoe" else logits
    with torch.no_grad():
        results = router(hidden, select_bias) if family.passes_bias else router(hidden)
    expected = _dense_gates(results)

    scale = getattr(router, "per_expert_scale", None)
    inputs = RouteInputs(
        logits,
        logit_bias=logit_bias,
        select_bias=select_bias,
        per_expert_scale=None if scale is None else scale.detach(),
    )
    ids, gates, count = route(inputs, family.routing)
    ours = torch.zeros(TOKENS, EXPERTS).scatter_add(1, ids, gates)
    assert torch.equal(ours != 0, expected != 0)
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert bool((count == family.routing.k).all())
    if select_bias is not None:
        without = route(RouteInputs(logits), family.routing)[0]
        assert not torch.equal(without.sort(1).values, ids.sort(1).values)


def _fill(router: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Makes the projection the identity and every other tensor random; (bias of the logits, bias of the selection)."""
    logit_bias = select_bias = None
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if tensor.ndim == 2 and tensor.shape == (EXPERTS, EXPERTS):
            tensor.data.copy_(torch.eye(EXPERTS))
        elif name.endswith(BIAS_NAMES):
            tensor.data.copy_(torch.randn(tensor.shape) * 0.4)
            select_bias = tensor.detach().reshape(EXPERTS)
        elif name.endswith("bias"):
            tensor.data.copy_(torch.randn(tensor.shape))
            logit_bias = tensor.detach()
    return logit_bias, select_bias


def _dense_gates(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if len(results) == 2:
        return results[0]
    _, weights, ids = results
    return torch.zeros(TOKENS, EXPERTS).scatter_add(1, ids, weights.float())
