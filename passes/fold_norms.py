"""Norms without weights, and layer norms as norms without a mean."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from moec.dialects.builtin import FuncOp, ModuleOp
from moec.dialects.nn import LayerNormOp, RMSNormOp
from moec.errors import UnsupportedModelError
from moec.experts.parts import settle_names
from moec.ir import Operation
from moec.passes.matching import tensor
from moec.passes.norm_folding.affine import has_batch_statistics
from moec.passes.norm_folding.folding import fold_block
from moec.passes.norm_folding.stream import center_streams, shorten_streams
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


class Target(Enum):
    """What becomes of norms."""

    AFFINE = "affine"  # their weights and biases go into linear maps, their kind stays
    RMS = "rms"  # layer norms become RMS norms, too
    CRMS = "crms"  # and the residual stream gets one channel less


@register_pass("fold-norms")
@dataclass(frozen=True)
class FoldNorms(Pass):
    """Folds what norms multiply and add into linear maps, and turns layer norms into RMS norms.

    1. Weight and bias of a norm, factors behind it (LayerNorm Scaling), batch norms in evaluation (RepBN of SLAB) and
       norms by running statistics (Unified Normalization) go into the linear maps that read them: W diag(s), b + W t.
       Where what reads is not linear, they go into the map in front of them, else they stay.
    2. `rms`: everything that writes to the residual stream is made to write vectors of mean zero, by subtracting from
       its matrix and bias their mean over the outputs; a layer norm that reads only such vectors is an RMS norm.
    3. `crms`: a vector of mean zero is known without its last channel, which writers then leave out; readers subtract
       the last column from the others, and the norm divides by sqrt((sum(x^2) + sum(x)^2) / hidden size + epsilon).

    Streams that the model gives as results or reads otherwise than by norms, post-norm models, and writers that are not
    linear are refused with the operation. The folded weights are stored in float64, so that the comparison in float64
    sees no rounding. Pre-RMSNorm and Pre-CRMSNorm Transformers (Jiang et al. 2023), SLAB (Guo et al. 2024).
    """

    claim: ClassVar[Claim] = Claim.EXACT
    # what layers give to each other loses its mean, or a channel
    layerwise: ClassVar[bool] = False
    forward = Statistic("norms and factors folded into the maps behind them")
    backward = Statistic("norms and factors folded into the maps in front of them")
    centred = Statistic("layer norms that became RMS norms")
    shortened = Statistic("RMS norms with one channel less")

    to: Target = option("what norms become", Target.RMS)
    untie: bool = option("fold into a weight that other operations read, too; it is then stored twice", True)

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        functions = list(op.functions()) if isinstance(op, ModuleOp) else [op]
        refused: list[tuple[Operation, str]] = []
        for function in functions:
            assert isinstance(function, FuncOp)
            block = function.body
            found = fold_block(block, weights, self.untie)
            context.count(self.forward, found.forward)
            context.count(self.backward, found.backward)
            refused += found.refused
            refused += [(inner, _NO_STATISTICS) for inner in block if has_batch_statistics(inner)]
            if refused and not any(map(_is_bare, block)) and not (found.forward or found.backward):
                raise _impossible("none of its norms can be folded", *refused[0])
            for target, statistic, rewrite in (
                (Target.RMS, self.centred, center_streams),
                (Target.CRMS, self.shortened, shorten_streams),
            ):
                if self.to not in (target, Target.CRMS):
                    continue
                streams = rewrite(block, weights, self.untie)
                context.count(statistic, streams.norms)
                refused += streams.refused
                for norm, reason in filter(_is_of_hidden_states, streams.refused):
                    raise _impossible(f"a norm of its hidden states cannot become to={target.value}", norm, reason)
            settle_names(function.return_op)
        for inner, reason in refused:
            context.refuse(inner, reason, self.pass_name)


_NO_STATISTICS = "it takes mean and variance from its batch, there are no running statistics"


def _is_bare(op: Operation) -> bool:
    return isinstance(op, LayerNormOp | RMSNormOp) and op.operand_count == 1


def _impossible(what: str, op: Operation, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}: {reason}",
        where=f"{op.name} at {op.location.name or 'an unnamed place'}",
        hint="to=affine folds the weights of those norms that only linear maps read, and leaves the others",
    )


def _is_of_hidden_states(refused: tuple[Operation, str]) -> bool:
    """Whether the norm is none inside of attention, where heads are an axis of their own."""
    return tensor(refused[0].operands[0]).rank < 4
