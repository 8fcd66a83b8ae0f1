"""Dense matrices as products of structured ones: low rank, blocks, shuffled blocks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor

from moec.dialects.aten import AtenOp
from moec.dialects.builtin import ModuleOp
from moec.dialects.moe import ExpertsOp, RouteOp
from moec.dialects.nn import MLPOp
from moec.errors import UsageError
from moec.experts.parts import settle_names
from moec.ir import Operation
from moec.passes.norm_folding.linear_maps import LinearMap, linear_map, load_matrix, source_of
from moec.passes.structuring.factors import Factors, block_dense, block_shuffle, low_rank
from moec.passes.structuring.rewriting import replace_by_factors
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.reference.layers import layer_of

_SHAPES = ("aten.view.default", "aten.permute.default")


class Structure(Enum):
    """What a matrix [out, in] becomes."""

    LOW_RANK = "low-rank"  # [out, r] [r, in]
    BLOCK_DENSE = "block-dense"  # [out, r] times a block-diagonal [r, in]
    BLOCK_SHUFFLE = "block-shuffle"  # block-diagonal, a permutation, block-diagonal


class Part(Enum):
    """Which linear maps are meant."""

    FEED_FORWARD = "feed-forward"  # those of dense blocks
    OTHER = "other"  # the others in layers: attention
    OUTSIDE = "outside"  # those outside of layers: the head


@register_pass("structure-linear")
@dataclass(frozen=True)
class StructureLinear(Pass):
    """Writes dense matrices as products of structured factors, the nearest ones to the matrix.

    1. `low-rank` keeps the `rank` largest singular values: the error is the root of the sum of the others' squares
       (Eckart, Young 1936).
    2. `block-dense` cuts the inputs into `blocks` and gives each rank / blocks singular vectors of its own: L
       blockdiag(R).
    3. `block-shuffle` cuts inputs and outputs into `blocks` and keeps `rank` singular values of each of the blocks^2
       parts, as block-diagonal times permutation times block-diagonal (Monarch, Dao et al. 2022).
    4. `guide` g computes g W x + (1 - g) S x with the old W beside the structured S, from which training starts.

    At full rank the function stays the same up to rounding; factors that hold more numbers than the matrix are written
    all the same, and counted. What is a product of matrices already is left as it is.

    StructuredFFN (CLAIRE-Labo), as a conversion.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    changed = Statistic("matrices")
    before = Statistic("numbers of these matrices before")
    after = Statistic("numbers of their factors")

    structure: Structure = option("what a matrix becomes", Structure.LOW_RANK)
    rank: int | None = option("low-rank and block-dense: inner size; block-shuffle: rank of each part, else 1", None)
    ratio: float | None = option("share of the numbers to keep, in place of a rank", None)
    blocks: int = option("blocks along each side", 4)
    guide: float = option("share of the old matrix that stays beside the structured one", 0.0)
    parts: tuple[Part, ...] = option("which linear maps", (Part.FEED_FORWARD,))

    def __post_init__(self) -> None:
        if self.rank is not None and self.ratio is not None:
            raise ValueError("rank and ratio exclude each other")
        if self.rank is None and self.ratio is None and self.structure is not Structure.BLOCK_SHUFFLE:
            raise ValueError("give a rank or a ratio")
        if (self.rank is not None and self.rank < 1) or self.blocks < 1 or not self.parts:
            raise ValueError("rank and blocks must be at least 1, and parts must name something")
        if self.ratio is not None and not self.ratio > 0:
            raise ValueError(f"ratio {self.ratio:g} is not positive")
        if not 0 <= self.guide <= 1:
            raise ValueError(f"guide {self.guide:g} is not within [0, 1]")

    def run(self, op: Operation, context: PassContext) -> None:
        weights = context.require_weights()
        maps = [found for inner in op.walk() if (found := linear_map(inner)) is not None and self._wanted(found)]
        maps = [found for found in maps if not _is_factor(found)]
        for found in maps:
            matrix = load_matrix(found.weight, weights)
            factors = self._factors(found, matrix.shape[0], matrix.shape[1])(matrix)
            error = float((matrix - factors.product()).norm() / matrix.norm().clamp(min=1e-300))
            context.remark(found.anchor, f"{found.weight.weight.weight_name}: {factors.text}, error {error:.2%}")
            replace_by_factors(found, factors, weights, self.guide)
            context.count(self.changed)
            context.count(self.before, matrix.numel())
            context.count(self.after, factors.numel + (matrix.numel() if self.guide else 0))
        for function in op.functions() if isinstance(op, ModuleOp) else ():
            settle_names(function.return_op)

    def _wanted(self, found: LinearMap) -> bool:
        holder = found.weight.holder
        if holder is not None:
            return isinstance(holder[0], MLPOp) and Part.FEED_FORWARD in self.parts
        if _leads_to_a_route(found.op) or found.weight.stacked:
            return False
        return (Part.OTHER if layer_of(found.op) is not None else Part.OUTSIDE) in self.parts

    def _factors(self, found: LinearMap, outputs: int, inputs: int) -> _Choice:
        """How to factor a matrix of these sizes; raises UsageError for a rank or blocks that do not fit."""
        where = found.weight.weight.weight_name
        if self.structure is not Structure.LOW_RANK and inputs % self.blocks:
            raise UsageError(f"{self.blocks} blocks do not divide {inputs} inputs", where=where)
        if self.structure is Structure.BLOCK_SHUFFLE and outputs % self.blocks:
            raise UsageError(f"{self.blocks} blocks do not divide {outputs} outputs", where=where)
        numbers = outputs * inputs
        match self.structure:
            case Structure.LOW_RANK:
                largest, each = min(outputs, inputs), outputs + inputs
            case Structure.BLOCK_DENSE:
                largest = self.blocks * min(outputs, inputs // self.blocks)
                each = outputs + inputs // self.blocks
            case Structure.BLOCK_SHUFFLE:
                largest, each = min(outputs, inputs) // self.blocks, self.blocks * (outputs + inputs)
        rank = self.rank or 1
        if self.ratio is not None:
            rank = min(largest, max(1, int(self.ratio * numbers / each)))
            if self.structure is Structure.BLOCK_DENSE:
                rank = max(self.blocks, rank // self.blocks * self.blocks)
        if rank > largest:
            raise UsageError(f"rank {rank} is larger than {largest}, the most that this structure has", where=where)
        if self.structure is Structure.BLOCK_DENSE and rank % self.blocks:
            raise UsageError(f"{self.blocks} blocks do not divide rank {rank}", where=where)
        return _Choice(self.structure, rank, self.blocks)


@dataclass(frozen=True)
class _Choice:
    """A structure with its numbers, which makes factors of a matrix."""

    structure: Structure
    rank: int
    blocks: int

    def __call__(self, matrix: Tensor) -> Factors:
        match self.structure:
            case Structure.LOW_RANK:
                return low_rank(matrix, self.rank)
            case Structure.BLOCK_DENSE:
                return block_dense(matrix, self.blocks, self.rank // self.blocks)
            case Structure.BLOCK_SHUFFLE:
                return block_shuffle(matrix, self.blocks, self.rank)


def _is_factor(found: LinearMap) -> bool:
    """Whether nothing but a new shape lies between the map and another one in front of it or behind it."""
    value = found.input
    while isinstance(op := value.defining_op, AtenOp) and op.name in _SHAPES:
        value = op.operands[0]
    if value.defining_op is not None and _is_fixed_product(value.defining_op):
        return True
    frontier = list(found.op.results)
    while frontier:
        for user in frontier.pop().users:
            if _is_fixed_product(user):
                return True
            if user.name in _SHAPES:
                frontier += user.results
    return False


def _is_fixed_product(op: Operation) -> bool:
    """Whether `op` multiplies by one fixed matrix, or by one for each entry of a batch."""
    if isinstance(op, AtenOp) and op.name == "aten.bmm.default":
        return source_of(op.tensor("mat2")) is not None
    return linear_map(op) is not None


def _leads_to_a_route(op: Operation) -> bool:
    frontier = list(op.results)
    while frontier:
        for user in frontier.pop().users:
            if isinstance(user, RouteOp | ExpertsOp):
                return True
            if user.name in ("aten.view.default", "aten._to_copy.default"):
                frontier += user.results
    return False
