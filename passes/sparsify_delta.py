"""Experts as one base and sparse signs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.calibration.sample import LayerSample
from moec.errors import UnsafeInputError
from moec.experts import (
    Dense,
    Expert,
    FeedForward,
    MoeLayer,
    Offset,
    Quantized,
    UnreadableExpertError,
    find_moe_layers,
    find_unreadable,
    load_expert,
    replace_experts,
)
from moec.ir import Operation
from moec.passes.delta_coding.fit import Coded, fit_signs
from moec.passes.delta_coding.signs import packed_signs
from moec.passes.factoring.sides import Side, dense_matrix, has_dense_matrices, projection, sides_of, with_matrices
from moec.passes.quantizing.choices import FormatOptions
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.rounding import round_matrix
from moec.weights.context import WeightContext


class BaseWeights(Enum):
    """What the base is the mean of: all experts alike, or each as often as tokens choose it."""

    EQUAL = "equal"
    FREQUENCY = "frequency"


class Scale(Enum):
    """The number that signs are multiplied with.

    LEAST_SQUARES: the mean size of the entries that stay. SEARCH: ComPEFT's, one of a few multiples of the standard
    deviation of all entries, the one with which the expert errs least on the calibration's rows.
    """

    LEAST_SQUARES = "least-squares"
    SEARCH = "search"


@register_pass("sparsify-delta")
@dataclass(frozen=True)
class SparsifyDelta(Pass):
    """Stores experts as one base for all of a layer and sparse signs for each: W = base + scale * signs (ComPEFT).

    1. The base of a matrix is the mean over the experts of equal sizes; it is stored once, in float32 or in integers of
       `base-bits`. Each of the further `rounds` takes the mean of what the signs leave.
    2. Of the entries of W - base the largest `density` stay, as signs with one scale for the matrix.

    Signs take five trits a byte here, 1.6 bits; `encode-ternary` after it makes streams of them, which come near their
    entropy. It is made for experts that came from one, by copying or fine-tuning: experts that were trained apart have
    a base that says nothing, and the remark gives the error of what is stored. Protected experts, and those with
    packed or factored matrices, stay as they are.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    experts = Statistic("experts that are a base and signs now")
    weights = Statistic("weights in their matrices")
    bytes_after = Statistic("bytes that they take now, bases included")

    density: float = option("share of the differences that stays", 0.2)
    scale: Scale = option("number that signs are multiplied with", Scale.LEAST_SQUARES)
    multiples: tuple[float, ...] = option("search: multiples of the standard deviation", (0.5, 1.0, 1.5, 2.0, 3.0, 4.0))
    base: BaseWeights = option("what the base is the mean of", BaseWeights.EQUAL)
    base_bits: int = option("bits of the base, 2 to 8; 0 keeps it in float32", 0)
    group: str = option("base-bits: weights that share a scale: a number of inputs, row, or tensor", "32")
    rounds: int = option("how often the base is taken", 4)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density:g} is not within (0, 1]")
        if self.base_bits != 0 and not 2 <= self.base_bits <= 8:
            raise ValueError(f"base-bits {self.base_bits} is neither 0 nor within 2..8")
        FormatOptions(bits=self.base_bits or 8, group=self.group).target()
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1")
        if not self.multiples or min(self.multiples) <= 0:
            raise ValueError("multiples must be above 0")

    def run(self, op: Operation, context: PassContext) -> None:
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        for layer in find_moe_layers(op):
            self._code(layer, context)

    def _code(self, layer: MoeLayer, context: PassContext) -> None:
        weights = context.require_weights()
        sample = None
        if self.scale is Scale.SEARCH or self.base is BaseWeights.FREQUENCY:
            sample = context.require_calibration().sample(layer)
        new: dict[int, Expert] = {}
        wrong = total = 0.0
        size = stored = 0
        for members in self._alike(layer, context):
            first = load_expert(layer, weights, members[0])
            assert isinstance(first, FeedForward)
            coded = {side: self._fit(layer, weights, members, side, sample) for side in sides_of(first)}
            for place, number in enumerate(members):
                expert = load_expert(layer, weights, number)
                assert isinstance(expert, FeedForward)
                new[number] = found = self._chosen(layer, expert, number, place, coded, sample)
                for side in coded:
                    matrix, before = _offset(found, side), dense_matrix(expert, side).double()
                    wrong += float((matrix.dense().double() - before).square().sum())
                    total += float(before.square().sum())
                    size += before.numel()
                    stored += matrix.delta.packed.nbytes
            stored += sum(_bytes(found.base) for found in coded.values())
        if not new:
            return
        changed = replace_experts(layer, weights, new)
        context.count(self.experts, len(new))
        context.count(self.weights, size)
        context.count(self.bytes_after, stored)
        error = (wrong / total) ** 0.5 if total else 0.0
        text = f"{len(new)} experts are a base and signs: {8 * stored / size:.3f} bits per weight, {error:.2%} off"
        context.remark(changed.experts, text)

    def _alike(self, layer: MoeLayer, context: PassContext) -> list[list[int]]:
        """Experts of equal sizes, at least two."""
        weights = context.require_weights()
        groups: dict[tuple[object, ...], list[int]] = {}
        for number in sorted(set(range(layer.expert_count)) - layer.protected):
            try:
                expert = load_expert(layer, weights, number)
            except UnreadableExpertError as error:
                context.refuse(layer.experts, error.message, self.pass_name)
                continue
            if not isinstance(expert, FeedForward) or not has_dense_matrices(expert):
                context.refuse(layer.experts, f"stored expert {number} has other than dense matrices", self.pass_name)
                continue
            shapes = tuple(None if (item := projection(expert, side)) is None else item.matrix.shape for side in Side)
            groups.setdefault((shapes, expert.activation.key), []).append(number)
        for members in groups.values():
            if len(members) == 1:
                context.refuse(layer.experts, f"no other expert has the sizes of {members[0]}", self.pass_name)
        return [members for members in groups.values() if len(members) > 1]

    def _fit(
        self, layer: MoeLayer, weights: WeightContext, members: Sequence[int], side: Side, sample: LayerSample | None
    ) -> Coded:
        shares = [1.0] * len(members)
        if self.base is BaseWeights.FREQUENCY and sample is not None:
            shares = [float(len(sample.chosen(layer, number)[0])) for number in members]
        loaders = [_loader(layer, weights, number, side) for number in members]
        return fit_signs(loaders, shares, self.density, self.rounds, lambda base: self._packed_base(layer, base))

    def _packed_base(self, layer: MoeLayer, base: torch.Tensor) -> Dense | Quantized:
        if not self.base_bits:
            return Dense(base)
        target = FormatOptions(bits=self.base_bits, group=self.group).target()
        return Quantized(round_matrix(target, base, f"{layer.name}, base"))

    def _chosen(
        self,
        layer: MoeLayer,
        expert: FeedForward,
        number: int,
        place: int,
        coded: dict[Side, Coded],
        sample: LayerSample | None,
    ) -> FeedForward:
        """The expert with the scales that the options ask for."""
        plain = {side: found.scales[place] for side, found in coded.items()}
        if self.scale is Scale.LEAST_SQUARES or sample is None:
            return _coded(expert, place, coded, plain)
        rows, gates = sample.chosen(layer, number)
        if not len(rows):
            return _coded(expert, place, coded, plain)
        x = sample.x[rows].float()
        wanted = expert.apply(x)
        candidates = [
            _coded(expert, place, coded, {side: each * found.deviations[place] for side, found in coded.items()})
            for each in self.multiples
        ]
        errors = [float((gates[:, None] * (found.apply(x) - wanted).double()).square().sum()) for found in candidates]
        return candidates[errors.index(min(errors))]


def _coded(expert: FeedForward, place: int, coded: dict[Side, Coded], scales: dict[Side, float]) -> FeedForward:
    matrices = {
        side: Offset(found.base, Quantized(packed_signs(found.signs[place], scales[side])))
        for side, found in coded.items()
    }
    return dataclasses.replace(with_matrices(expert, dict(matrices)), loaded=expert.loaded)


def _loader(layer: MoeLayer, weights: WeightContext, number: int, side: Side) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        expert = load_expert(layer, weights, number)
        assert isinstance(expert, FeedForward)
        found = dense_matrix(expert, side)
        if not bool(torch.isfinite(found).all()):
            where = f"{layer.name}, expert {number}, {side.value}"
            raise UnsafeInputError("a matrix holds NaN or infinity", where=where, hint="the checkpoint is broken")
        return found

    return load


def _offset(expert: FeedForward, side: Side) -> Offset:
    found = projection(expert, side)
    assert found is not None and isinstance(found.matrix, Offset)
    return found.matrix


def _bytes(base: Dense | Quantized) -> int:
    return base.packed.nbytes if isinstance(base, Quantized) else base.weight.nbytes
