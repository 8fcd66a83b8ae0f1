"""The matrices of one feed-forward block by GPTQ, each for what it reads behind those that were packed before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moec.experts import FeedForward
from moec.passes.factoring.sides import Side
from moec.passes.quantizing.blocks import Part
from moec.passes.quantizing.inputs import second_moment
from moec.quantization.packed import Packed
from moec.quantization.rounding import Target
from moec.quantization.second_order import Damped, Fallback, round_second_order


@dataclass(frozen=True)
class SecondOrderOptions:
    """`target` gives the format for a part's own bits and columns, the others are as the options of `quantize`."""

    target: Callable[[int | None, int], Target]
    damping: float
    ordered: bool = True
    rounds: int = 0
    refit: bool = False


@dataclass(frozen=True)
class _LastProduct:
    """The last matrix [H, m] of a block as it is to be rounded, and the second moment [m, m] of what it reads."""

    block: FeedForward
    weight: torch.Tensor
    moment: Damped


@dataclass
class SecondOrder:
    """The rounding of one block. `source` is the block before anything was rounded.

    It reads `rows` [n, H], whose `weights` [n] say how much they count; None where all count alike. `fallbacks` are
    what the matrices so far needed.
    """

    options: SecondOrderOptions
    source: FeedForward
    rows: torch.Tensor
    weights: torch.Tensor | None = None
    fallbacks: list[Fallback] = field(default_factory=list)
    _inputs: Damped | None = field(default=None, repr=False)
    _wanted: torch.Tensor | None = field(default=None, repr=False)
    """What the source gives for the rows, times their weights."""
    # codes of several bits may be asked for behind the same other matrices
    _last: _LastProduct | None = field(default=None, repr=False)

    def __call__(self, part: Part) -> Packed:
        weight = part.weight
        if part.side is Side.DOWN:
            last = self._last_product(part.block, refit=self.options.refit and part.inputs is None)
            moment = last.moment
            if part.inputs is None:
                weight = last.weight
        else:
            moment = self.inputs
        if part.inputs is not None:
            moment = Damped(moment.moment[part.inputs][:, part.inputs], self.options.damping)
        result = round_second_order(
            self.options.target(part.bits, weight.shape[1]),
            weight,
            moment,
            ordered=self.options.ordered,
            rounds=self.options.rounds,
            where=part.where,
        )
        self.fallbacks.append(result.fallback)
        return result.packed

    @property
    def inputs(self) -> Damped:
        """The second moment [H, H] of the rows; gate and up read the same ones."""
        if self._inputs is None:
            self._inputs = Damped(second_moment(self.rows, self.weights), self.options.damping)
        return self._inputs

    def _last_product(self, block: FeedForward, *, refit: bool) -> _LastProduct:
        if self._last is None or self._last.block is not block:
            hidden = block.hidden_activations(self.rows)
            moment, weight = second_moment(hidden, self.weights), block.down.dense()
            if refit:
                weight = self._refitted(weight.double(), hidden.double(), moment)
            self._last = _LastProduct(block, weight, Damped(moment, self.options.damping))
        return self._last

    def _refitted(self, weight: torch.Tensor, hidden: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """The last matrix [H, m] that gives for `hidden` [n, m] of the moment what the source gives for its own."""
        if self._wanted is None:
            self._wanted = self.source.hidden_activations(self.rows).double() @ self.source.down.dense().double().T
            if self.weights is not None:
                self._wanted *= self.weights[:, None]
        crossed = self._wanted.T @ hidden - weight @ moment
        damped = moment.diagonal().mean() * self.options.damping
        if not bool(crossed.isfinite().all()) or not damped > 0:
            return weight
        regular = moment + damped * torch.eye(len(moment), dtype=torch.float64)
        change: torch.Tensor = torch.linalg.solve(regular, crossed.T).T
        return weight + change
