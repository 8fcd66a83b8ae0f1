"""Architectures with experts for models whose own architecture has none: Mixtral, Qwen2-MoE, Qwen3-MoE.

A dense model that passes gave experts keeps its attention, norms and embeddings; what an architecture with experts has
beside them must be what the module does. Some of that is only another spelling, which is rewritten: a factor of
experts' sum is carried by their last matrices, a shared block that always counts in full is half of a doubled one
behind Qwen2-MoE's gate, which is one half where its weight is zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moec.codegen.huggingface.experts import WIDTH_STEP, Change
from moec.codegen.huggingface.fields import Values
from moec.codegen.huggingface.routing import canonical_routing
from moec.dialects import aten
from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp, RouteOp, Routing, Score, Select, WeightFrom
from moec.dialects.nn import MLPOp
from moec.errors import MoecError, UnsupportedModelError
from moec.experts import (
    Dense,
    FeedForward,
    MoeLayer,
    Projection,
    find_dense_layers,
    find_moe_layers,
    load_dense,
    load_expert,
    replace_router,
    replace_routing,
)
from moec.experts.bodies import build_body, operands_of
from moec.experts.dense import DenseLayer
from moec.experts.parts import new_weight, static_shape_of, store_tensor, tensor_of
from moec.frontend.model_config import CONFIG_FILE, resolve_model
from moec.ir import Operation, TensorType, Value
from moec.module import Module
from moec.weights.context import WeightContext

_LAYER = re.compile(r"\.(\d+)(?=\.|$)")
_OWN = frozenset({"model_type", "architectures", "transformers_version", "auto_map", "base_model_tp_plan"})
_ONNX = "emit ONNX, which takes any IR"


def needs_host(module: Module) -> bool:
    """Whether the module has experts, and the model of its config none."""
    if not any(isinstance(op, ExpertsOp) for op in module.op.walk()):
        return False
    config = resolve_model({k: v for k, v in module.config.items() if k != "quantization_config"}, CONFIG_FILE).config
    return not any("expert" in name for name in config.to_dict())


@dataclass(frozen=True)
class _Facts:
    """What the module needs of a host. `shared` [layers]: the dense block beside the experts of each layer, or None."""

    experts: int
    k: int
    width: int
    normalised: bool
    shared: tuple[DenseLayer | None, ...]
    shared_width: int
    dense: tuple[int, ...]


def choose_host(
    module: Module, values: Values, *, uniform: bool, fits: Callable[[Values, Module], str | None]
) -> tuple[Module, Values, tuple[Change, ...]]:
    """The module in the spelling of an architecture with experts, the config of that one, and what became larger.

    `fits` says what keeps the model of a config from being a module. Raises UnsupportedModelError, with what would be
    expressible, where no architecture can say what the module does.
    """
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    ours = Module(clone, module.weights, module.source)
    for layer in find_moe_layers(clone):
        _normalise(layer, module.weights)
    facts = _facts(ours)
    problems = []
    for name, config in _hosts(values, facts, uniform):
        spelled, changes = _spelled(ours, name, facts)
        try:
            problem = fits(config, spelled)
        except MoecError as error:
            problem = error.message
        if problem is None:
            return spelled, config, changes
        problems.append(f"{name}: {problem}")
    if not problems:
        problems = [_no_host(facts)]
    raise UnsupportedModelError(
        f"no architecture of transformers with experts computes what this module does ({'; '.join(problems)})",
        hint=_nearest(facts),
    )


def _no_host(facts: _Facts) -> str:
    if any(facts.shared) and not all(facts.shared):
        return "some layers have a shared block and others have none"
    return "only --uniform has a form for them" if not any(facts.shared) else "none has this combination"


def _nearest(facts: _Facts) -> str:
    if not facts.normalised and not any(facts.shared):
        return f"set-routing{{combine=softmax}} or shared neurons make it a Mixtral or Qwen2-MoE; or {_ONNX}"
    return _ONNX


def _normalise(layer: MoeLayer, weights: WeightContext) -> None:
    """Brings a router into the spelling of a softmax over a linear map. Raises UnsupportedModelError for others."""
    routing, count = layer.route.routing, layer.outputs
    if routing.weight_from is WeightFrom.ONE and routing.select in (Select.TOPK, Select.ALL) and not routing.offset:
        if routing.select is Select.TOPK and routing.k != count:
            raise UnsupportedModelError(
                f"its {routing.k} chosen experts of {count} count in full; architectures of transformers with experts "
                "weigh them by their scores",
                where=layer.name,
                hint="the nearest that they say, with nearly equal gates, is set-routing{combine=softmax spread=0.004 "
                f"scale=calibrated}} behind init-router{{bias=false}}, as the recipe best has it, or all experts, "
                f"k={count}; or {_ONNX}",
            )
        # all of them are chosen: equal logits give each one k-th, and the factor undoes that
        width = static_shape_of(layer.router.tensor("weight"))[1]
        layer = replace_router(layer, weights, torch.zeros(count, width), None)
        selected = Routing(k=count, weight_from=WeightFrom.SOFTMAX_SELECTED, scale=routing.scale * count)
        layer = replace_routing(layer, selected)
    bias = next((value for value in layer.router.tensors("bias")), None)
    if bias is not None:
        raise UnsupportedModelError(
            "its router has a bias, and the routers of Mixtral, Qwen2-MoE and Qwen3-MoE have none",
            where=layer.name,
            hint=f"init-router{{bias=false}} fits one without, which chooses about as well; or {_ONNX}",
        )
    if routing.temperature != 1.0 and _is_plain_softmax(layer.route):
        layer = _with_unit_temperature(layer, weights)
    canonical = canonical_routing(layer.route)
    plain = Routing(
        select=Select.ALL if canonical.select is Select.ALL else Select.TOPK,
        k=canonical.k,
        choice_on=canonical.choice_on,
        weight_from=canonical.weight_from,
    )
    if canonical != plain or canonical.weight_from not in (WeightFrom.SCORE, WeightFrom.SOFTMAX_SELECTED):
        raise UnsupportedModelError(
            f"its router works otherwise than a softmax whose k largest count: {_told(canonical, plain)}",
            where=layer.name,
            hint=f"set-routing{{combine=softmax}} with a number of experts k is expressible; or {_ONNX}",
        )


def _is_plain_softmax(route: RouteOp) -> bool:
    """Whether a factor of the router's weight is all that a temperature is, and what its rows share does nothing."""
    routing = route.routing
    softmax = routing.score is Score.SOFTMAX and routing.weight_from in (WeightFrom.SCORE, WeightFrom.SOFTMAX_SELECTED)
    return softmax and not routing.softcap and route.logit_bias is None and route.logits.has_one_use


def _with_unit_temperature(layer: MoeLayer, weights: WeightContext) -> MoeLayer:
    """Its temperature in the weight of the router.

    What all rows of the weight have in common is left out: it changes no softmax, and narrow numbers hold the rest
    better.
    """
    routing = layer.route.routing
    op = layer.router.tensor("weight").defining_op
    assert isinstance(op, WeightOp)
    weight = weights.load(op.source).double()
    weight = (weight - weight.mean(0)) / routing.temperature
    layer = replace_router(layer, weights, weight.float())
    return replace_routing(layer, replace(routing, temperature=1.0))


def _told(found: Routing, plain: Routing) -> str:
    names = [name for name in Routing.__dataclass_fields__ if getattr(found, name) != getattr(plain, name)]
    shown = [f"{name} = {getattr(getattr(found, name), 'value', getattr(found, name))}" for name in names]
    return ", ".join(shown) or f"gates from {found.weight_from.value}"


def _facts(module: Module) -> _Facts:
    layers = find_moe_layers(module.op)
    blocks = {block.op: block for block in find_dense_layers(module.op)}
    shared = tuple(blocks[found[1]] if (found := _shared_block(layer)) is not None else None for layer in layers)
    routings = [canonical_routing(layer.route) for layer in layers]
    for what, numbers in (
        ("numbers of experts", {layer.outputs for layer in layers}),
        ("numbers of experts per token", {routing.k for routing in routings}),
        ("ways to weigh experts", {routing.weight_from for routing in routings}),
    ):
        if len(numbers) > 1:
            raise UnsupportedModelError(
                f"the layers have different {what}; a config of transformers has one for all", hint=_ONNX
            )
    beside = {block.op for block in shared if block is not None}
    places = [_LAYER.search(op.location.name) for op in blocks if op not in beside]
    left = sorted({int(place.group(1)) for place in places if place is not None})
    widths = [
        expert.width
        for layer in layers
        for group in layer.experts.classes
        if isinstance(expert := load_expert(layer, module.weights, group.experts[0]), FeedForward)
    ]
    shared_widths = {_loaded(block, module).width for block in shared if block is not None}
    if len(shared_widths) > 1:
        raise UnsupportedModelError("shared blocks have different widths; a config of transformers has one", hint=_ONNX)
    return _Facts(
        layers[0].outputs,
        routings[0].k or layers[0].outputs,
        -(-max(widths, default=WIDTH_STEP) // WIDTH_STEP) * WIDTH_STEP,
        routings[0].weight_from is WeightFrom.SOFTMAX_SELECTED,
        shared,
        next(iter(shared_widths), WIDTH_STEP),
        tuple(left),
    )


def _loaded(block: DenseLayer, module: Module) -> FeedForward:
    found = load_dense(block, module.weights)
    parts = [found.gate, found.up, found.down]
    if any(part is None or part.bias is not None or not isinstance(part.matrix, Dense) for part in parts):
        raise UnsupportedModelError("its shared block is no gated block without biases", where=block.name, hint=_ONNX)
    return found


def _shared_block(layer: MoeLayer) -> tuple[Operation, MLPOp] | None:
    """(the sum of routed experts and a dense block, that block) where a layer has one."""
    value: Value = layer.experts.y
    while len(value.users) == 1:
        user = value.users[0]
        if user.name == "aten.view.default":
            value = user.results[0]
            continue
        if user.name != "aten.add.Tensor":
            return None
        other = next((operand for operand in user.operands if operand is not value), None)
        maker = None if other is None else other.defining_op
        return (user, maker) if isinstance(maker, MLPOp) else None
    return None


def _hosts(values: Values, facts: _Facts, uniform: bool) -> list[tuple[str, Values]]:
    """Configs to try, the plainest architecture first."""
    source = resolve_model(values, CONFIG_FILE).config.to_dict()
    biased = bool(source.get("attention_bias", values.get("model_type") == "qwen2"))
    common: Values = {"num_experts_per_tok": facts.k}
    by_layer: Values = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(facts.dense),
        "norm_topk_prob": facts.normalised,
    }
    found: list[tuple[str, Values]] = []
    if facts.normalised and not any(facts.shared) and not facts.dense:
        own: Values = {"num_local_experts": facts.experts, "intermediate_size": facts.width, "sliding_window": None}
        if values.get("sliding_window") is not None:
            own["sliding_window"] = values["sliding_window"]
        found.append(("mixtral", {**common, **own}))
    routed = {"num_experts": facts.experts, "moe_intermediate_size": facts.width, **common, **by_layer}
    if not any(facts.shared):
        found.append(("qwen3_moe", routed))
    if all(facts.shared) or (uniform and not any(facts.shared)):
        gated: Values = {"shared_expert_intermediate_size": facts.shared_width, "qkv_bias": biased}
        found.append(("qwen2_moe", {**routed, **gated}))
    return [(name, _host_values(source, name, own)) for name, own in found]


def _host_values(source: dict[str, Any], model_type: str, own: Values) -> Values:
    """The source's settings as far as the architecture has them, and its own."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    defaults = AutoConfig.for_model(model_type).to_dict()
    taken = {key: source[key] for key in defaults if key in source and key not in _OWN}
    return {
        **taken,
        **own,
        "model_type": model_type,
        "architectures": [str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])],
    }


def _spelled(module: Module, model_type: str, facts: _Facts) -> tuple[Module, tuple[Change, ...]]:
    """The module as the architecture spells it."""
    if model_type != "qwen2_moe":
        return module, ()
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    ours = Module(clone, module.weights, module.source)
    blocks = {block.op: block for block in find_dense_layers(clone)}
    changes = []
    for layer in find_moe_layers(clone):
        found = _shared_block(layer)
        if found is None:
            _add_gated(layer, _nothing(layer, module.weights, facts.shared_width), module.weights, None)
            changes.append(Change(layer.name, f"a shared expert of {facts.shared_width} zero neurons"))
            continue
        block = _loaded(blocks[found[1]], ours)
        down = replace(block.down, matrix=Dense(2 * block.down.dense()))
        _add_gated(layer, replace(block, down=down), module.weights, found)
    return ours, tuple(changes)


def _nothing(layer: MoeLayer, weights: WeightContext, width: int) -> FeedForward:
    """A gated block of zeros with the activation of the layer's experts."""
    expert = load_expert(layer, weights, 0)
    if not isinstance(expert, FeedForward) or expert.gate is None:
        raise UnsupportedModelError("its experts are no gated blocks", where=layer.name, hint=_ONNX)
    hidden = layer.hidden_size
    rows = Projection(Dense(torch.zeros(width, hidden)))
    return FeedForward(expert.activation, rows, rows, Projection(Dense(torch.zeros(hidden, width))))


def _add_gated(
    layer: MoeLayer, block: FeedForward, weights: WeightContext, found: tuple[Operation, MLPOp] | None
) -> None:
    """experts + sigmoid(0 x) * block(x), in place of the sum of experts and a dense block."""
    experts = layer.experts
    rows, kind, readers = experts.x, tensor_of(experts.y), list(experts.y.uses)
    anchor = experts.next if found is None else found[0]
    assert anchor is not None

    def insert(op: Operation) -> Value:
        op.location = experts.location
        op.insert_before(anchor)
        return op.results[0]

    def weight(name: str, tensor: torch.Tensor) -> Value:
        return new_weight(anchor, f"{layer.name}.{name}", store_tensor(weights, tensor), tuple(tensor.shape))

    given = [weight(f"shared_expert.{item.name}", item.tensor) for item in operands_of(block)]
    dense = insert(MLPOp(rows, given, regions=[build_body(block, layer.hidden_size)]))
    one = TensorType((*kind.shape[:-1], 1), kind.dtype)
    zeros = weight("shared_expert_gate", torch.zeros(1, layer.hidden_size))
    gate = insert(aten.build("linear.default", {"input": rows, "weight": zeros}, (one,)))
    gate = insert(aten.build("sigmoid.default", {"self": gate}, (one,)))
    gated = insert(aten.build("mul.Tensor", {"self": gate, "other": dense}, (kind,)))
    total = aten.build("add.Tensor", {"self": experts.y, "other": gated}, (kind,))
    result = insert(total)
    if found is None:
        for user, position in readers:
            user.set_operand(position, result)
        return
    target = tensor_of(found[0].results[0])
    if target != kind:
        result = insert(aten.build("view.default", {"self": result}, (target,), size=target.shape))
    found[0].replace_with([result])
