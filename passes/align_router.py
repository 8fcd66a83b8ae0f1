"""Routers that choose as they did: refitted after their experts changed, or rounded with clipping for each row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from moec.calibration.calibration import calibrate_module
from moec.calibration.sample import LayerSample
from moec.calibration.walk import WalkSettings
from moec.dialects.builtin import WeightOp
from moec.dialects.quant import Integer
from moec.errors import UsageError
from moec.experts import MoeLayer, find_moe_layers, find_unreadable, replace_router
from moec.ir import Operation
from moec.passes.quantizing.places import Place, What, pack_place
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass
from moec.quantization.rounding import Target, round_groups, round_matrix

_BATCH = 16
_TEN_THOUSANDTHS = 10_000
_LEAST_RATIO = 0.35


class Method(Enum):
    """CLIP: the weight in few bits, each row clipped where that keeps the router's distribution. REFIT: new numbers."""

    CLIP = "clip"
    REFIT = "refit"


@register_pass("align-router")
@dataclass(frozen=True)
class AlignRouter(Pass):
    """Makes routers give the distributions over experts that they gave on the calibration text.

    1. `refit`: behind passes that changed experts, which changed what later routers read. The model as it is now runs
       on the same tokens; each router gets the weights of least KL(p | q) of softmaxes, p from the calibrated model,
       with a share of the squared change of its weights; Newton steps on a convex function (L-BFGS, in float64).
    2. `clip` (EAQuant's router alignment, row by row): the weight is packed as symmetric integers with one scale per
       row. The range of each row in turn is clipped to the ratio of 0.35 to 1 of the least KL(p | q) over the k experts
       that a token prefers, and `top-share` of the others.

    The share of choices that stay is counted before and after, in ten-thousandths of a layer's mean.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    anchor: ClassVar[str] = "builtin.module"
    aligned = Statistic("routers changed")
    before = Statistic("choices of the calibrated model that routers made before, in ten-thousandths")
    after = Statistic("choices of the calibrated model that they make after, in ten-thousandths")

    method: Method = option("what is done", Method.REFIT)
    bits: int = option("clip: bits of a weight", 8)
    steps: int = option("clip: ratios to try; refit: steps at most", 50)
    top_share: float = option("clip: share of the experts that a token does not prefer that count", 0.0)
    ridge: float = option("refit: weight of the squared change of the router", 1e-4)

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits {self.bits} is not within 2..8")
        if self.steps < 1:
            raise ValueError("steps must be at least 1")
        if not 0 <= self.top_share <= 1 or not self.ridge > 0:
            raise ValueError("top-share must be within 0..1, and ridge above 0")

    def run(self, op: Operation, context: PassContext) -> None:
        for unreadable in find_unreadable(op):
            context.refuse(unreadable.op, unreadable.reason, self.pass_name)
        shares: list[tuple[float, float]] = []
        # routers are refitted in order, so that later ones see what earlier ones do
        for index in range(len(find_moe_layers(op))):
            layer = find_moe_layers(op)[index]
            if not isinstance(layer.router.tensor("weight").defining_op, WeightOp):
                context.refuse(layer.router, "its router is packed already", self.pass_name)
                continue
            calibrated = context.require_calibration().sample(layer)
            found = self._refit(layer, calibrated, context) if self.method is Method.REFIT else None
            shares.append(found or self._clip(layer, calibrated, context))
        if shares:
            context.count(self.aligned, len(shares))
            for statistic, values in ((self.before, [a for a, _ in shares]), (self.after, [b for _, b in shares])):
                context.count(statistic, round(sum(values) / len(values) * _TEN_THOUSANDTHS))

    # -- refit --------------------

    def _refit(self, layer: MoeLayer, calibrated: LayerSample, context: PassContext) -> tuple[float, float]:
        weights, module, calibration = context.require_weights(), context.module, context.require_calibration()
        if module is None:
            raise UsageError("there is no model to run", hint="name it with --source, or use `moec compile`")
        settings = WalkSettings(len(calibrated), _BATCH, False, torch.float32)
        rows = calibrate_module(module, calibration.data, settings).sample(layer).router_input.double()
        old, bias = _router(layer, context)
        wanted = calibrated.router_input.double() @ old.T + bias
        if wanted.shape != (len(rows), layer.outputs):
            raise UsageError("the calibration is of other tokens", where=layer.name, hint="calibrate again")
        start = rows @ old.T + bias
        new = _least_divergence(rows, wanted, old, bias, self.ridge, self.steps)
        stays = (_agreement(wanted, start, layer.top_k), _agreement(wanted, rows @ new.T + bias, layer.top_k))
        if not bool(new.isfinite().all()):
            context.refuse(layer.router, "its refit has no finite solution", self.pass_name)
            return stays[0], stays[0]
        kept = bias.float() if layer.router.tensors("bias") else None
        changed = replace_router(layer, weights, new.float(), kept)
        context.remark(changed.router, f"{stays[0]:.1%} of its choices stayed, now {stays[1]:.1%}")
        return stays

    # -- clip --------------------

    def _clip(self, layer: MoeLayer, sample: LayerSample, context: PassContext) -> tuple[float, float]:
        weights = context.require_weights()
        weight, bias = _router(layer, context)
        rows = sample.router_input.double()
        wanted = rows @ weight.T + bias
        target = Target(Integer(self.bits))
        clipped = weight.clone()
        rounded = _rounded(target, weight)
        logits = rows @ rounded.T + bias
        before = _agreement(wanted, logits, layer.top_k)
        count = min(layer.outputs, layer.top_k + int(self.top_share * (layer.outputs - layer.top_k)))
        counted = wanted.topk(count, dim=1).indices
        goal = wanted.gather(1, counted).log_softmax(1)
        for row in range(layer.outputs):
            best = _divergence(goal, logits, counted)
            largest = weight[row].abs().max()
            for ratio in torch.linspace(_LEAST_RATIO, 1, self.steps, dtype=torch.float64).flip(0)[1:]:
                cut = weight[row].clamp(-largest * ratio, largest * ratio)
                column = rows @ _rounded(target, cut[None])[0] + bias[row]
                tried = torch.cat([logits[:, :row], column[:, None], logits[:, row + 1 :]], dim=1)
                divergence = _divergence(goal, tried, counted)
                if divergence < best:
                    best, logits, clipped[row] = divergence, tried, cut
        op = layer.router.tensor("weight").defining_op
        assert isinstance(op, WeightOp)
        packed = round_matrix(target, clipped, op.weight_name)
        pack_place(Place(What.ROUTER, op, (layer.router,)), weights, packed)
        after = _agreement(wanted, rows @ packed.dense(torch.float64).T + bias, layer.top_k)
        context.remark(layer.router, f"{self.bits} bits: {before:.1%} of its choices stay, {after:.1%} with clipping")
        return before, after


def _router(layer: MoeLayer, context: PassContext) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [R, H], bias [R]) of a router, float64."""
    weights = context.require_weights()
    found = layer.router.tensor("weight").defining_op
    assert isinstance(found, WeightOp)
    bias = torch.zeros(layer.outputs, dtype=torch.float64)
    for value in layer.router.tensors("bias"):
        if not isinstance(value.defining_op, WeightOp):
            raise UsageError("the bias of a router is computed", where=layer.name)
        bias = weights.load(value.defining_op.source).double()
    return weights.load(found.source).double(), bias


def _least_divergence(
    rows: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor, bias: torch.Tensor, ridge: float, steps: int
) -> torch.Tensor:
    """The router [R, H] of least mean KL(softmax(wanted) | softmax(rows W^T + bias)) + ridge * mean square change."""
    goal = wanted.softmax(1)
    # in units in which rows have mean square one, so that steps fit
    unit = rows.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    change = torch.zeros_like(old, requires_grad=True)
    solver = torch.optim.LBFGS([change], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        logits = rows @ (old + change / unit).T + bias
        loss = -(goal * logits.log_softmax(1)).sum(1).mean() + ridge * change.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    return (old + change / unit).detach()


def _rounded(target: Target, weight: torch.Tensor) -> torch.Tensor:
    """Rows float64 rounded to the grid."""
    grid, codes = round_groups(target, weight)
    return grid.decode(codes[:, None])[:, 0]


def _divergence(goal: torch.Tensor, logits: torch.Tensor, counted: torch.Tensor) -> float:
    """Mean KL over the experts that count; `goal` are their log-probabilities."""
    found = logits.gather(1, counted).log_softmax(1)
    return float((goal.exp() * (goal - found)).sum(1).mean())


def _agreement(wanted: torch.Tensor, found: torch.Tensor, k: int) -> float:
    """The share of the k largest logits that are the same."""
    k = min(k, wanted.shape[1])
    one, other = (torch.zeros_like(item).scatter_(1, item.topk(k, dim=1).indices, 1.0) for item in (wanted, found))
    return float((one * other).sum() / one.sum().clamp_min(1))
