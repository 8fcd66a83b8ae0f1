"""Upcycling: dense feed-forward blocks become layers of whole experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch

from moec.dialects.moe import WeightFrom
from moec.errors import UsageError
from moec.experts import (
    FeedForward,
    find_dense_layers,
    make_sparse,
    replace_router,
    replace_routing,
)
from moec.experts.dense import DenseLayer
from moec.frontend.other_sources import OtherSource
from moec.ir import Operation
from moec.passes.neuron_pruning.slicing import load_sliceable
from moec.passes.upcycling.attention import AttentionBlock, find_attention, sharing_problem, soften, widen
from moec.passes.upcycling.copies import drawn_neurons, shards, ternary, with_new_neurons, with_noise
from moec.passes.upcycling.parallel import make_parallel
from moec.passes.upcycling.sources import average_weights, load_dense_of
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Kind(Enum):
    """What an expert is made of."""

    COPY = "copy"  # the block as it is
    TERNARY = "ternary"  # its matrices with three values each, as MoTE


class Perturbation(Enum):
    """What tells copies apart."""

    NONE = "none"
    NOISE = "noise"  # normal numbers on some of the elements
    DROP = "drop"  # some neurons are drawn anew, as Drop-Upcycling


class Shared(Enum):
    """What every token runs beside its experts."""

    NONE = "none"
    SEED = "seed"  # the block itself


class Sources(Enum):
    """Whose blocks become experts."""

    SELF = "self"  # copies of the model's own
    ALL = "all"  # one of every model, the first one included
    OTHERS = "others"  # one of every model but the first


class Rest(Enum):
    """What the weights outside of experts are."""

    FIRST = "first"  # those of the first model
    AVERAGE = "average"  # the mean over the models that give experts


class Attention(Enum):
    """What becomes of attention where there are several models."""

    KEEP = "keep"  # it is as all that is outside of experts
    SOFT_EXPERTS = "soft-experts"  # that of every model, weighed by a router of its own
    SOFT_EXPERTS_SHARED_KV = "soft-experts-shared-kv"  # queries and outputs of every model, keys and values of one


class Gates(Enum):
    """What the outputs of the chosen experts are multiplied with."""

    SOFTMAX = "softmax"  # the softmax of the chosen logits, which adds up to one
    SCORE = "score"  # the softmax of all logits, as Switch; adds up to less than one


@register_pass("upcycle")
@dataclass(frozen=True)
class Upcycle(Pass):
    """Makes every dense feed-forward block a layer of whole experts: copies of it, or one of each of several models.

    1. Each block becomes `experts` copies, or with `granularity` G that many copies of G shards each. Plain copies stay
       the bytes of the source: nothing is written for them.
    2. The router is random, the same for the shards of a copy. Gates are the softmax of the chosen logits, and the sum
       of G shards is multiplied with G: then the layer computes what the block did, whoever is chosen. With shards, k
       must be a multiple of G, so that whole copies are chosen.
    3. `perturb` makes copies differ, `kind=ternary` makes them cheap, `shared=seed` keeps the block beside them and
       `scale` multiplies what is routed. The factor is the route's, never one of gate's rows, which are not linear.

    4. With `sources=all` expert i is the block of model i (`--with`), bit by bit, and with `rest=average` every other
       weight is the mean over the models, taken in float32 and rounded once.
    5. `attention=soft-experts` also runs every model's attention on every token and adds up what they give, by the
       softmax of a second router; each has a cache of its own. With shared keys and values it is one attention with the
       queries of all, and the cache is that of one model.

    The claim is exact for plain copies whose gates add up to one, and lossy for everything else. Sparse Upcycling
    (Komatsuzaki et al. 2022), Drop-Upcycling (Nakamura et al. 2025), virtual groups (He et al. 2024, with their factor
    moved off gate), Branch-Train-MiX (Sukhbaatar et al. 2024), BAM (Zhang et al. 2024), MoTE, Dynamic-DINO.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    blocks = Statistic("dense blocks that became layers of experts")
    averaged = Statistic("weights that are averages over models")
    attentions = Statistic("attention layers that became soft experts")
    experts: int = option("copies of each block; 0: eight, or one of every source", 0)
    sources: Sources = option("whose blocks become experts", Sources.SELF)
    rest: Rest = option("what weights outside of experts are", Rest.FIRST)
    granularity: int = option("shards that each copy is cut into", 1)
    k: int = option("experts for each token; 0: two, or all shards of one copy", 0)
    gates: Gates = option("what outputs are multiplied with", Gates.SOFTMAX)
    kind: Kind = option("what copies are made of", Kind.COPY)
    perturb: Perturbation = option("what tells copies apart", Perturbation.NONE)
    ratio: float = option("the share of elements that get noise, or of neurons that are drawn anew", 0.5)
    noise: float = option("standard deviation of the noise", 0.02)
    aligned: bool = option("draw the same neurons anew in all matrices of an expert", True)
    shared: Shared = option("what every token runs beside its experts", Shared.NONE)
    scale: float = option("factor of the sum of experts", 1.0)
    attention: Attention = option("what becomes of attention where there are several models", Attention.KEEP)
    parallel: bool = option("let feed-forward blocks read what their attention reads", False)
    every: int = option("only every n-th block, the n-th first", 1)
    layers: tuple[int, ...] = option("only the blocks of these numbers, counted from 0", ())
    deviation: float = option("standard deviation of the router's weights", 0.02)

    def __post_init__(self) -> None:
        for name in ("granularity", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.experts < 0:
            raise ValueError("experts must not be negative")
        if self.sources is Sources.SELF and self.rest is Rest.AVERAGE:
            raise ValueError("rest=average needs sources=all or sources=others")
        if self.sources is Sources.SELF and (self.attention is not Attention.KEEP or self.parallel):
            raise ValueError("attention and parallel need sources=all or sources=others")
        if self.sources is not Sources.SELF and self.experts:
            raise ValueError("of several sources each gives one expert, so experts cannot be chosen")
        if self.k < 0 or self.noise < 0 or not 0 <= self.ratio <= 1:
            raise ValueError("k and noise must not be negative, ratio must be within 0..1")
        if self.deviation <= 0:
            raise ValueError("deviation must be positive: a router of zeros cannot tell groups apart")
        if not 0 <= self.scale < float("inf"):
            raise ValueError("scale must be a number that is not negative")
        if self.k % self.granularity:
            raise ValueError(
                f"k = {self.k} is no multiple of granularity {self.granularity}: parts of a copy would be chosen"
            )
        if self.sources is Sources.SELF:
            self._require_enough(self._copies * self.granularity)
        if self.every > 1 and self.layers:
            raise ValueError("every and layers exclude each other")

    def promise(self) -> Claim:
        if self.sources is not Sources.SELF:
            return Claim.LOSSY
        if self.shared is Shared.SEED:
            return Claim.EXACT if self.scale == 0 else Claim.LOSSY
        changed = self.kind is not Kind.COPY or (self.perturb is not Perturbation.NONE and self.ratio > 0)
        adds_up = self.gates is Gates.SOFTMAX or self._choices(self._copies) == self._copies * self.granularity
        return Claim.EXACT if adds_up and not changed and self.scale == 1 else Claim.LOSSY

    @property
    def _copies(self) -> int:
        """Experts of each block where there is one source."""
        return self.experts or 8

    def _choices(self, experts: int) -> int:
        """Router outputs for each token, of `experts` whole experts."""
        return self.k or (self.granularity if self.granularity > 1 else min(2, experts))

    def _require_enough(self, outputs: int) -> None:
        if self.k > outputs:
            raise ValueError(f"{self.k} experts cannot be chosen among {outputs}")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        chosen = self._chosen([layer for layer in find_dense_layers(op) if not layer.is_beside_experts])
        sources: list[OtherSource | None] = [None] * self._copies
        if self.sources is not Sources.SELF:
            others = context.require_others()
            sources = [None, *others] if self.sources is Sources.ALL else list(others)
            if self.k > len(sources) * self.granularity:
                raise UsageError(f"{self.k} experts cannot be chosen among {len(sources) * self.granularity}")
        attention = self._attention_blocks(op, context)
        if self.rest is Rest.AVERAGE:
            inside = {value.defining_op for layer in chosen for value in layer.op.weights}
            left = {weight for weight in inside if weight is not None}
            for place in attention:
                shared = self.attention is Attention.SOFT_EXPERTS_SHARED_KV
                left |= place.weights_of_one_expert() if shared else place.weights()
            context.count(self.averaged, average_weights(op, weights, sources, left))
        if self.parallel:
            known = [place for _, place in find_attention(op) if not isinstance(place, str)]
            for layer in chosen:
                if not make_parallel(layer, known):
                    context.refuse(layer.op, "it reads no sum of its block's input and attention", self.pass_name)
        for number, place in enumerate(attention):
            self._soften(place, number, sources, context)
        for layer in chosen:
            block = load_sliceable(layer, context, self.pass_name)
            if block is None:
                continue
            if block.width % self.granularity:
                raise UsageError(
                    f"{self.granularity} shards do not divide {block.width} neurons",
                    where=layer.name,
                    hint="choose a granularity that divides them",
                )
            generator = torch.Generator().manual_seed(context.seed * 1_000_003 + layer.index)
            router = torch.randn(len(sources), layer.hidden_size, generator=generator) * self.deviation
            blocks = [block if source is None else load_dense_of(layer, weights, source) for source in sources]
            copies = [self._copy(item, generator) for item in blocks]
            experts = [shard for copy in copies for shard in shards(copy, self.granularity)]
            made = make_sparse(layer, weights, experts, block if self.shared is Shared.SEED else None)
            made = replace_router(made, weights, router.repeat_interleave(self.granularity, dim=0))
            weight_from = WeightFrom.SOFTMAX_SELECTED if self.gates is Gates.SOFTMAX else WeightFrom.SCORE
            routing = replace(
                made.route.routing,
                k=self._choices(len(sources)),
                weight_from=weight_from,
                scale=self.granularity * self.scale,
            )
            made = replace_routing(made, routing)
            if self.promise() is Claim.LOSSY and self.gates is Gates.SCORE:
                context.remark(
                    made.route, "gates do not add up to one, so equal experts do not give what the block did"
                )
            if self.perturb is Perturbation.DROP and not self.aligned and self.ratio > 0:
                context.remark(
                    made.experts,
                    "other neurons are drawn anew in each matrix, so that more than `ratio` of them are broken",
                )
            context.count(self.blocks)

    def _attention_blocks(self, op: Operation, context: PassContext) -> list[AttentionBlock]:
        """The attention layers that become soft experts."""
        if self.attention is Attention.KEEP:
            return []
        found = []
        for place, block in find_attention(op):
            problem = block if isinstance(block, str) else ""
            if not isinstance(block, str) and self.attention is Attention.SOFT_EXPERTS_SHARED_KV:
                problem = sharing_problem(block)
            if problem or isinstance(block, str):
                context.refuse(place, problem, self.pass_name)
            else:
                found.append(block)
        return found

    def _soften(
        self, block: AttentionBlock, number: int, sources: list[OtherSource | None], context: PassContext
    ) -> None:
        generator = torch.Generator().manual_seed(context.seed * 1_000_003 + 500_000 + number)
        router = torch.randn(len(sources), block.hidden_size, generator=generator) * self.deviation
        change = widen if self.attention is Attention.SOFT_EXPERTS_SHARED_KV else soften
        change(block, context.require_weights(), sources, router)
        context.count(self.attentions)

    def _chosen(self, blocks: list[DenseLayer]) -> list[DenseLayer]:
        if not blocks:
            raise UsageError(
                "there is no dense feed-forward block", hint="upcycle belongs in front of what makes experts"
            )
        unknown = [number for number in self.layers if not 0 <= number < len(blocks)]
        if unknown:
            raise UsageError(f"there is no block {unknown[0]} among {len(blocks)}", hint="count from 0")
        if self.layers:
            return [blocks[number] for number in sorted(set(self.layers))]
        return blocks[self.every - 1 :: self.every]

    def _copy(self, block: FeedForward, generator: torch.Generator) -> FeedForward:
        if self.kind is Kind.TERNARY:
            block = ternary(block)
        match self.perturb:
            case Perturbation.NOISE:
                return with_noise(block, self.ratio, self.noise, generator)
            case Perturbation.DROP:
                drawn = drawn_neurons(block.width, self.ratio, generator)
                if self.aligned:
                    return with_new_neurons(block, (drawn, drawn, drawn), generator)
                others = [drawn_neurons(block.width, self.ratio, generator) for _ in range(2)]
                return with_new_neurons(block, (drawn, *others), generator)
        return block
