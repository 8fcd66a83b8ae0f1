"""Codes and scales of one block trained on what the block gives: block-wise training as in EfficientQAT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moec.calibration.sample import spread_rows
from moec.dialects.quant import Integer, ZeroPoint
from moec.experts import Dense, FeedForward, Matrix, Quantized
from moec.passes.factoring.sides import Side, projection, with_matrices
from moec.quantization.packed import Packed, pack_codes
from moec.quantization.packing import unpack_bits

_MOST_ROWS = 2048
_HELD_OUT = 5
_CODE_RATE = 0.02
_SCALE_RATE = 0.002
_CHECKS = 10


@dataclass(frozen=True)
class TrainedBlock:
    """A packed block, and its error on held-out rows, relative to what the block gave, before and after."""

    block: FeedForward
    before: float
    after: float


def train_block(
    source: FeedForward, packed: FeedForward, rows: torch.Tensor, weights: torch.Tensor, steps: int
) -> TrainedBlock:
    """Trains the codes and scales of the integer matrices of `packed` to give what `source` gives.

    `rows` [n, H] with `weights` float64 [n]; every fifth is held out, and what errs least there counts, the start
    included. Rounding passes gradients straight through. Zero points stay. Adam, at falling rates.
    """
    chosen = spread_rows(len(rows), _MOST_ROWS)
    rows, weights = rows[chosen].float(), weights[chosen].float()
    held_out = torch.arange(len(rows)) % _HELD_OUT == 0
    parts = {
        side: _Trainable(found.matrix.packed)
        for side in Side
        if (found := projection(packed, side)) is not None
        and isinstance(found.matrix, Quantized)
        and isinstance(found.matrix.packed.format, Integer)
    }
    if not parts or int((~held_out).sum()) < 2:
        return TrainedBlock(packed, 0.0, 0.0)
    wanted = source.apply(rows)

    def error(part: torch.Tensor, matrices: Mapping[Side, Matrix]) -> torch.Tensor:
        found = with_matrices(packed, matrices).apply(rows[part])
        wrong = ((found - wanted[part]).square().sum(1) * weights[part]).sum()
        return wrong / (wanted[part].square().sum(1) * weights[part]).sum().clamp_min(torch.finfo(torch.float32).tiny)

    def measured() -> float:
        with torch.no_grad():
            return float(error(held_out, {side: Dense(part.packed().dense()) for side, part in parts.items()}))

    before = best = measured()
    kept = {side: part.packed() for side, part in parts.items()}
    optimizer = torch.optim.Adam(
        [
            {"params": [part.latent for part in parts.values()], "lr": _CODE_RATE},
            {"params": [part.factor for part in parts.values()], "lr": _SCALE_RATE},
        ]
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    checks = {steps * (check + 1) // _CHECKS for check in range(_CHECKS)}
    for step in range(1, steps + 1):
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = error(~held_out, {side: Dense(part.weight()) for side, part in parts.items()})
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        if step in checks and (now := measured()) < best:
            best, kept = now, {side: part.packed() for side, part in parts.items()}
    matrices: dict[Side, Matrix] = {side: Quantized(item) for side, item in kept.items()}
    return TrainedBlock(with_matrices(packed, matrices), before, best)


class _Trainable:
    """An integer matrix whose codes are rounded numbers, and whose scales have a factor."""

    def __init__(self, packed: Packed) -> None:
        assert isinstance(packed.format, Integer)
        self._packed = packed
        self._format = packed.format
        self.latent = packed.integer_codes().float().requires_grad_()
        self.factor = torch.zeros(packed.scales.shape).requires_grad_()
        self._zeros = self._zero_points()

    def weight(self) -> torch.Tensor:
        """The matrix [N, K], differentiable."""
        limited = self.latent.clamp(0, (1 << self._format.bits) - 1)
        codes = limited + (limited.round() - limited).detach()
        scales = self._packed.scales.float() * self.factor.exp()
        return (codes - self._spread(self._zeros)) * self._spread(scales)

    def packed(self) -> Packed:
        """As it is now."""
        codes = self.latent.detach().round().clamp(0, (1 << self._format.bits) - 1).to(torch.uint8)
        scales = (self._packed.scales.float() * self.factor.detach().exp()).to(self._packed.scales.dtype)
        return replace(self._packed, codes=pack_codes(self._format, codes), scales=scales)

    def _zero_points(self) -> torch.Tensor:
        if self._packed.zero_points is None:
            return torch.tensor([[self._format.middle]])
        if self._format.zero_point is ZeroPoint.FLOAT:
            return self._packed.zero_points.float()
        return unpack_bits(self._packed.zero_points, self._format.bits, self._packed.scales.shape[1]).float()

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        groups = values.shape[1]
        return values if groups == 1 else values.repeat_interleave(self._packed.columns // groups, dim=1)
