"""Weights for routers, found without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from moec.dialects.builtin import ModuleOp
from moec.errors import UsageError
from moec.experts import (
    FeedForward,
    MoeLayer,
    UnreadableExpertError,
    find_moe_layers,
    replace_router,
)
from moec.experts.router_source import feed_router, freeze_router
from moec.experts.run import expert_outputs
from moec.ir import Operation, TensorType
from moec.passes.factorizing.activity import Activity, Observed, markers
from moec.passes.router_init.features import (
    FeatureBuilder,
    hidden_features,
    neuron_features,
    representatives,
    token_embedding,
)
from moec.passes.router_init.prompts import PromptMode, prompt_rows, read_prompts
from moec.passes.router_init.solutions import (
    FitTarget,
    domain_rows,
    expert_importance,
    fit_target,
    group_rows,
    joined,
    least_squares,
    medoids,
    row_centroids,
    token_table,
    weight_centroids,
)
from moec.passes.routing.labels import experts_with_neurons
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass

_ROWS_PER_UNKNOWN = 32
_CONDITION = 5.0


class RouterKind(Enum):
    """Where router weights come from."""

    RANDOM = "random"  # normal numbers of standard deviation `deviation`
    FROZEN_RANDOM = "frozen-random"  # the same, and no pass trains them (SMoE-Dropout)
    GROUP = "group"  # random, equal for the `shards` outputs of each copy (virtual groups)
    WEIGHT_CENTROID = "weight-centroid"  # the mean direction of the expert's gate rows (MoEfication)
    ACTIVATION_CENTROID = "activation-centroid"  # the mean row of the tokens that the expert serves best
    LEAST_SQUARES = "least-squares"  # the linear map nearest to what each expert gives to each token
    NEURON = "representative-neuron"  # what one neuron of each expert does (CMoE)
    HIDDEN_LAYER = "hidden-layer"  # tanh of the weight centroids, then the identity; to be trained (MoEfication)
    PROMPTS = "prompts"  # texts for each expert, in the file `prompts` (mergekit)
    DOMAIN = "domain-embedding"  # a projection of the mean embedding of one text for each expert (Nexus)
    TOKEN_TABLE = "token-table"  # logits of each token of the vocabulary: hidden states decide nothing (pre-gate)


_BIAS_OF_CHOICE = (RouterKind.RANDOM, RouterKind.FROZEN_RANDOM, RouterKind.GROUP, RouterKind.LEAST_SQUARES)


@register_pass("init-router")
@dataclass(frozen=True)
class InitRouter(Pass):
    """Gives every router weights that rank experts, without training: in closed form, by chance, or from texts.

    1. What expert e gives to row x is the sum over its neurons of |phi_i(x)| ||D_i||, or the length of its output where
       it is heads of attention. `least-squares` fits a linear map with a bias to that (`target=contribution`), to the
       share that each expert has of it, or to how many experts give less, on the calibration sample. The last two let
       every row count alike, since rows with large activations would decide the fit of what is given itself.
       The fit needs 32 rows for each of its hidden size + 1 unknowns to be reliable, and says where there are fewer.
       `bias=false` fits one through the origin, such as the routers of Mixtral are. `activation-centroid` sends a row
       to the nearest of the experts' mean rows, exactly: its bias is -||c||^2 / 2.
    2. `random`, `frozen-random`, `group`, `weight-centroid` and `hidden-layer` need no calibration. A bias goes into
       the choice, and has no influence on gates where they are one.
    3. `representative-neuron`, `hidden-layer` and `token-table` compute E features in front of the router, which
       becomes the identity: |sigma(x g_e)(x u_e)| with rows of length 1 of the neuron whose activity is nearest to the
       mean of its expert; tanh(x W^T); a row of a table [vocabulary, E] for the token itself. So experts can still be
       dropped, moved and trained.
    4. `prompts` reads the file `prompts`, a YAML list with an entry `positive: [texts]`, and `negative` where there
       are some, for each expert; rows have length 1, and a condition number above 5 is told. `domain-embedding` needs a
       calibration on one text for each expert, `calibrate{text=a.txt,b.txt}`: row e is P (d_e - mean d), d_e the mean
       token embedding of text e, P the least-squares map from the mean embedding of a sequence to what the router
       reads of it; stored is their product.
    5. `token-table` averages what experts give over the rows of each token, and takes the least-squares map of token
       embeddings for `prior` more rows, so for unseen tokens it alone. With `common` all layers have one table, of the
       sum over layers, each divided by its mean.

    Only layers whose outputs each name an expert of their own are changed. Routers of a trained model are replaced,
    too, so the pass belongs behind `factorize` or `upcycle`.

    MoEfication (Zhang et al. 2022), LLaMA-MoE v2, CMoE, Nexus, Read-ME, SMoE-Dropout, mergekit.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    changed = Statistic("routers")
    kind: RouterKind = option("where the weights come from", RouterKind.LEAST_SQUARES)
    deviation: float = option("standard deviation of random weights", 0.02)
    ridge: float = option("least squares: damping as a share of the mean squared input", 1e-4)
    target: FitTarget = option("least squares: what the map is to come near to", FitTarget.RANK)
    shards: int = option("group: outputs that make one whole block", 1)
    active: int = option("representative-neuron: neurons that count as active on a token", 10)
    prompts: Path | None = option("prompts: the file", None)
    mode: PromptMode = option("prompts: what stands for a prompt", PromptMode.HIDDEN)
    prior: float = option("token-table: rows that the map of token embeddings counts as", 4.0)
    bias: bool | None = option("with a bias; only least-squares has one unless told otherwise, others get zeros", None)
    common: bool = option("token-table: one table for all layers", False)

    def __post_init__(self) -> None:
        if self.deviation <= 0 or self.ridge < 0 or self.prior <= 0:
            raise ValueError("deviation and prior must be positive, ridge must not be negative")
        if self.shards < 1 or self.active < 1:
            raise ValueError("shards and active must be at least 1")
        if (self.prompts is None) == (self.kind is RouterKind.PROMPTS):
            raise ValueError("prompts names a file for kind=prompts")
        if self.bias is not None and self.kind not in _BIAS_OF_CHOICE:
            raise ValueError(f"kind={self.kind.value} leaves no choice of a bias")
        if self.common and self.kind is not RouterKind.TOKEN_TABLE:
            raise ValueError("common is for kind=token-table")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        layers, routers = [], set()
        for layer in find_moe_layers(op):
            if sorted(layer.stored) != list(range(layer.outputs)):
                context.refuse(layer.experts, "router outputs share experts, or have none", self.pass_name)
            elif layer.router not in routers:
                # a layer that follows another one's router has no weights of its own
                routers.add(layer.router)
                layers.append(layer)
        if self.kind is RouterKind.TOKEN_TABLE:
            self._give_tables(op, layers, context)
            return
        from_prompts = self._from_prompts(op, layers, context) if self.kind is RouterKind.PROMPTS else {}
        for layer in layers:
            # solutions are by stored expert, rows of the router by output
            order = torch.tensor(layer.stored)
            if self.kind in (RouterKind.NEURON, RouterKind.HIDDEN_LAYER):
                self._give_features(layer, order, context)
            else:
                found = from_prompts.get(layer.name)
                weight, bias = self._solve(op, layer, context) if found is None else (found, None)
                _require_numbers(layer, weight)
                layer = replace_router(layer, weights, weight[order], None if bias is None else bias[order])
                if self.kind is RouterKind.FROZEN_RANDOM:
                    freeze_router(layer)
            context.count(self.changed)

    def _solve(self, op: Operation, layer: MoeLayer, context: PassContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [E, F] and bias [E] by stored expert."""
        generator = torch.Generator().manual_seed(context.seed * 1_000_003 + layer.index)
        width = _router_width(layer)
        match self.kind:
            case RouterKind.RANDOM | RouterKind.FROZEN_RANDOM:
                weight = torch.randn(layer.expert_count, width, generator=generator) * self.deviation
                return weight, torch.zeros(layer.expert_count) if self.bias else None
            case RouterKind.GROUP:
                if layer.outputs % self.shards:
                    raise UsageError(f"{self.shards} shards do not divide {layer.outputs} outputs", where=layer.name)
                weight = group_rows(layer.outputs, self.shards, width, self.deviation, generator)
                return weight, torch.zeros(layer.outputs) if self.bias else None
            case RouterKind.WEIGHT_CENTROID:
                return weight_centroids(experts_with_neurons(layer, context.require_weights())), None
            case RouterKind.DOMAIN:
                return self._domains(op, layer, context), None
        sample = context.require_calibration().sample(layer)
        importance = _importance(layer, sample.x, context)
        if self.kind is RouterKind.ACTIVATION_CENTROID:
            return row_centroids(sample.router_input, importance)
        self._require_rows(layer, len(sample), width + (self.bias is not False), context)
        target = fit_target(self.target, importance)
        weight, bias = least_squares(sample.router_input, target, self.ridge, bias=self.bias is not False)
        return weight, None if self.bias is False else bias

    def _require_rows(self, layer: MoeLayer, rows: int, unknowns: int, context: PassContext) -> None:
        needed = _ROWS_PER_UNKNOWN * unknowns
        advice = f"calibrate{{sequences={-(-needed // 64)} length=64 reservoir={needed}}}, parameters of recipes, too"
        if rows < unknowns:
            raise UsageError(f"{rows} rows do not determine {unknowns} unknowns of each expert", where=layer.name,
                             hint=f"give {needed} tokens or more: {advice}")  # fmt: skip
        if rows < needed:
            told = f"{rows} rows for {unknowns} unknowns of each expert; give {needed} tokens or more: {advice}"
            context.warn(layer.route, told)

    def _domains(self, op: Operation, layer: MoeLayer, context: PassContext) -> torch.Tensor:
        calibration = context.require_calibration()
        sample = calibration.sample(layer)
        domain = calibration.domains(sample)
        count = len(calibration.data.domains)
        if count != layer.expert_count:
            raise UsageError(
                f"the calibration has {count} texts, and the layer {layer.expert_count} experts",
                where=layer.name,
                hint="domain-embedding needs one text for each expert: calibrate{text=a.txt,b.txt}",
            )
        assert isinstance(op, ModuleOp)
        embedding = token_embedding(op, context.require_weights())
        tokens = embedding[calibration.token_ids(sample)]
        weight, _, _ = domain_rows(sample.router_input, tokens, sample.sequence, domain, max(self.ridge, 1e-6))
        return weight

    def _give_features(self, layer: MoeLayer, order: torch.Tensor, context: PassContext) -> None:
        """Features of the router's rows, and the identity behind them."""
        weights = context.require_weights()
        experts = experts_with_neurons(layer, context.require_weights())
        build = FeatureBuilder(layer, weights)
        if self.kind is RouterKind.NEURON:
            gate, up = representatives(experts, self._chosen(layer, experts, context))
            gate, up = None if gate is None else gate[order], up[order]
            rows = build.neurons(experts[0].activation, gate, up)
            features = partial(neuron_features, experts[0].activation, gate, up)
        else:
            weight = weight_centroids(experts)[order].float()
            rows = build.hidden_layer(weight)
            features = partial(hidden_features, weight)
        feed_router(layer, weights, rows, torch.eye(layer.outputs))
        calibration = None if context.module is None else context.module.calibration
        if calibration is not None and calibration.knows(layer):
            before = calibration.sample(layer).router_input.float()
            _tell_calibration(context, {layer.name: features(before)})

    def _chosen(self, layer: MoeLayer, experts: Sequence[FeedForward], context: PassContext) -> list[int]:
        """The representative neuron of each expert."""
        calibration = context.require_calibration()
        observed = Observed.of(calibration, calibration.sample(layer))
        # the most active neurons of a row are found among those of all experts
        whole = joined(experts)
        marked = markers(whole, observed, min(self.active, whole.width), Activity.NORMALIZED)
        return medoids(marked, [expert.width for expert in experts])

    def _give_tables(self, op: Operation, layers: Sequence[MoeLayer], context: PassContext) -> None:
        weights, calibration = context.require_weights(), context.require_calibration()
        assert isinstance(op, ModuleOp)
        embedding = token_embedding(op, weights)
        targets: dict[str, torch.Tensor] = {}
        for layer in layers:
            sample = calibration.sample(layer)
            importance = _importance(layer, sample.x, context)
            targets[layer.name] = importance[:, torch.tensor(layer.stored)] / importance.mean().clamp(min=1e-300)
        if self.common and targets:
            shapes = {tuple(target.shape) for target in targets.values()}
            if len(shapes) > 1:
                raise UsageError("layers with different numbers of experts have no table in common")
            total = torch.stack(list(targets.values())).sum(0)
            targets = dict.fromkeys(targets, total)
        tables: dict[int, torch.Tensor] = {}
        for layer in layers:
            target = targets[layer.name]
            sample = calibration.sample(layer)
            ids = calibration.token_ids(sample)
            self._require_rows(layer, len(sample), embedding.shape[1] + 1, context)
            table = tables.get(id(target))
            if table is None:
                table = tables[id(target)] = token_table(ids, target, embedding, self.prior, self.ridge).float()
            _require_numbers(layer, table)
            rows = FeatureBuilder(layer, weights).token_rows(op, table)
            feed_router(layer, weights, rows, torch.eye(layer.outputs))
            _tell_calibration(context, {layer.name: table[ids]})
            context.count(self.changed)

    def _from_prompts(self, op: Operation, layers: Sequence[MoeLayer], context: PassContext) -> dict[str, torch.Tensor]:
        assert self.prompts is not None and isinstance(op, ModuleOp)
        if context.module is None:
            raise UsageError("there is no model to run the prompts on", hint="name it with --source")
        counts = sorted({layer.expert_count for layer in layers})
        if len(counts) > 1:
            raise UsageError(f"layers have {counts} experts, and prompts are for one number of them")
        if not counts:
            return {}
        prompts = read_prompts(self.prompts, counts[0])
        embedding = token_embedding(op, context.require_weights()) if self.mode is PromptMode.CHEAP_EMBED else None
        found = prompt_rows(context.module, layers, prompts, self.mode, embedding)
        for layer in layers:
            condition = float(torch.linalg.cond(found[layer.name]))
            note = f"the prompts' rows have condition number {condition:.1f}"
            if condition > _CONDITION:
                note += ": some experts have nearly the same prompts"
            context.remark(layer.route, note)
        return found


def _tell_calibration(context: PassContext, inputs: dict[str, torch.Tensor]) -> None:
    """What the routers read now of the calibration's sample, for the passes behind this one."""
    module = context.module
    if module is not None and module.calibration is not None:
        module.calibration = module.calibration.with_router_inputs(inputs)


def _importance(layer: MoeLayer, x: torch.Tensor, context: PassContext) -> torch.Tensor:
    """What each stored expert gives to rows [n, H], float64 [n, E]."""
    try:
        return expert_importance(experts_with_neurons(layer, context.require_weights()), x)
    except UnreadableExpertError:
        norms = [y.norm(dim=1).double() for y in expert_outputs(layer, context.require_weights(), x)]
        by_output = torch.stack(norms, dim=1)
        return by_output[:, torch.tensor(layer.stored).argsort()]


def _router_width(layer: MoeLayer) -> int:
    kind = layer.router.tensor("input").type
    assert isinstance(kind, TensorType) and isinstance(kind.shape[-1], int)
    return kind.shape[-1]


def _require_numbers(layer: MoeLayer, weight: torch.Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise UsageError("the router would not be finite numbers", where=layer.name)
