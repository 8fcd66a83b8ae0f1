"""`moe.replica` on torch."""

from __future__ import annotations

import torch

from moec.dialects.moe import ReplicaOp
from moec.reference.frame import Frame
from moec.reference.kernels import Kernel, prepares


@prepares(ReplicaOp)
def prepare_replica(op: ReplicaOp) -> Kernel:
    """ids and gates."""

    def compute(frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        ids, gates = frame.tensor(op.ids), frame.tensor(op.gates)
        before, total = gates_before(gates)
        ids = torch.where(before <= op.high * total, ids, ids + op.outputs)
        return ids, torch.where(before <= op.low * total, gates, 0.0) if op.low < 1 else gates

    return compute


def gates_before(gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([T, K] the sum of |gate| over the slots that count more than a slot, [T, 1] that of all); of gates [T, K]."""
    sizes = gates.abs()
    own, other = sizes[:, :, None], sizes[:, None, :]
    earlier = torch.ones(gates.shape[1], gates.shape[1], dtype=torch.bool).tril(-1)
    counts_more = (other > own) | ((other == own) & earlier)
    return torch.where(counts_more, other, 0.0).sum(2), sizes.sum(1, keepdim=True)


def replica_margin(op: ReplicaOp, gates: torch.Tensor) -> torch.Tensor:
    """[T]: the least that the rank of a used slot of a token must move before the slot reads another replica.

    Gates that are nearly equal may change places, which moves ranks by a gate; that counts too.
    """
    before, total = gates_before(gates)
    total = torch.where(total == 0, 1.0, total)
    used = gates != 0
    far = torch.full_like(gates, torch.inf)
    borders = [border for border in (op.high, op.low) if border < 1]
    margin = far
    for border in borders:
        margin = torch.minimum(margin, torch.where(used, (before / total - border).abs(), far))
    if borders and gates.shape[1] > 1:
        ranked = torch.sort(gates.abs(), dim=1, descending=True).values
        gaps = (ranked[:, :-1] - ranked[:, 1:]) / total
        margin = torch.minimum(margin, torch.nn.functional.pad(gaps, (0, 1), value=torch.inf))
    return margin.amin(1)
