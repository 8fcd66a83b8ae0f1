"""Calibration: what all other passes know of the text that a model is used for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import torch

from moec.calibration.calibration import Calibration, calibrate_module, starved_experts
from moec.calibration.data import IDS_SUFFIXES, read_data
from moec.calibration.walk import WalkSettings
from moec.errors import UsageError
from moec.experts.dense import find_dense_layers
from moec.experts.layer import MoeLayer, find_moe_layers, find_unreadable
from moec.ir.operation import Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Precision(Enum):
    """The type that the model itself runs in; sums are float64 always."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


@register_pass("calibrate")
@dataclass(frozen=True)
class Calibrate(Pass):
    """Runs the model on text and gathers the statistics that other passes share; it changes nothing.

    1. One walk, layer by layer over all sequences: each layer's weights are loaded once, and first-order sums over the
       tokens of each expert are added up in float64 while it runs. Gates are those that the model multiplies with.
    2. An evenly spread reservoir of tokens is kept of each layer, the same in all; what is larger than sums (second
       moments, every expert on every token) is computed from it by the passes that need it. Dense feed-forward blocks
       have a reservoir too, for `factorize`; those that stand beside experts have none.
    3. With `gradients` one walk back gives the derivative of the text's loss by the output of every layer's experts.
    4. The result is kept in the store by the digests of model, weights and tokens, and recalled from it.
    5. Experts that fewer than `coverage` tokens chose are named in a remark. Their statistics are the sums over the
       tokens that there are: zero, with count zero, where there are none.

    Text goes through the model's own tokenizer and is cut into windows; the seed of the run picks which. Several texts
    are several domains to passes that tell them apart.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    anchor: ClassVar[str] = "builtin.module"
    layers = Statistic("layers with experts")
    blocks = Statistic("dense feed-forward blocks")
    tokens_seen = Statistic("tokens")
    sequences_seen = Statistic("sequences")
    starved = Statistic("experts that fewer than `coverage` tokens chose")
    recalled = Statistic("1 where the result came from the store")
    text: tuple[Path, ...] = option(
        "text files; without any, what --calibration names, or texts that come with moec", ()
    )
    tokens: Path | None = option("a file of token ids instead: .npy, or .json with a list or a list of lists", None)
    sequences: int = option("windows to take at most", 128)
    length: int = option("tokens of a window", 64)
    gradients: bool = option("also walk back from the loss", False)
    all_experts: bool = option("also make the tables that need every expert on every row of the reservoir", False)
    heads: bool = option("also keep rows of attention, for factorize{target=attention-heads}", False)
    reservoir: int = option("tokens to keep of each layer at most", 8192)
    batch: int = option("sequences that run at once", 16)
    precision: Precision = option("type that the model runs in", Precision.FLOAT32)
    coverage: int = option("tokens that an expert should have", 16)

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "reservoir", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    def run(self, op: Operation, context: PassContext) -> None:
        module = context.module
        if module is None:
            raise UsageError("there is no model to run", hint="name it with --source, or use `moec compile`")
        texts, tokens = self._files(context.calibration_file)
        data = read_data(
            module, texts=texts, tokens=tokens, sequences=self.sequences, length=self.length, seed=context.seed
        )
        dtype = torch.float64 if self.precision is Precision.FLOAT64 else torch.float32
        settings = WalkSettings(self.reservoir, self.batch, self.gradients, dtype)
        calibration = calibrate_module(module, data, settings, all_experts=self.all_experts, heads=self.heads)
        module.calibration = calibration
        context.count(self.tokens_seen, data.tokens)
        context.count(self.sequences_seen, len(data.sequences))
        context.count(self.recalled, int(calibration.from_cache))
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        context.count(self.blocks, sum(not block.is_beside_experts for block in find_dense_layers(op)))
        for layer in find_moe_layers(op):
            context.count(self.layers)
            self._report(layer, calibration, context)

    def _files(self, given: Path | None) -> tuple[tuple[Path, ...], Path | None]:
        """Text files and the file of ids: those of the options, else what the whole run was given."""
        if self.text or self.tokens is not None or given is None:
            return self.text, self.tokens
        return ((), given) if given.suffix in IDS_SUFFIXES else ((given,), None)

    def _report(self, layer: MoeLayer, calibration: Calibration, context: PassContext) -> None:
        statistics = calibration.statistics(layer)
        counts = statistics.count
        context.remark(
            layer.experts,
            f"{statistics.tokens} tokens; per expert {counts.min():.0f} to {counts.max():.0f}, "
            f"{counts.median():.0f} in the middle",
        )
        few = starved_experts(statistics, self.coverage)
        if few:
            context.count(self.starved, len(few))
            named = ", ".join(f"{expert} ({counts[expert]:.0f})" for expert in few)
            context.remark(
                layer.experts,
                f"fewer than {self.coverage} tokens chose the experts {named}; their statistics are the sums over "
                "these tokens, zero where there are none: give more text, or text of the kind that they are for",
            )
