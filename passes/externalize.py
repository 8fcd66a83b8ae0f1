"""Experts in a file of their own, so that a runtime reads only those that tokens choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.dialects.builtin import PAGE_ATTRIBUTE, PREPACKED_ATTRIBUTE, ModuleOp
from moec.dialects.moe import ExpertsOp
from moec.ir import Operation
from moec.pipeline.base import Claim, Pass, PassContext, Statistic, option, register_pass


@register_pass("externalize")
@dataclass(frozen=True)
class Externalize(Pass):
    """Lays experts out for runs that keep only some of them in memory (EdgeMoE, HOBBIT).

    In the ONNX artifact experts get a file of their own, in the order in which a run reaches them. All matrices of an
    expert lie together and start on a page of their own, so that a runtime that maps the file reads an expert when a
    token first chooses it. On the target ort-cpu, experts go to operators that compute on the mapped bytes, where there
    are such; `prepacked` helps those that would copy their weights when the model is loaded, for more disk, and packed
    experts then go to `MatMulNBits`, as ONNX Runtime 1.31 cannot load what it arranges for `QMoE`.
    What a run needs for this is in `session.json` beside the model, and `moec run` and its like follow it.
    """

    claim: ClassVar[Claim] = Claim.EXACT
    layers = Statistic("layers of experts")
    page: int = option("bytes of a page, a power of two from 4096; 65536 suits every system", 65536)
    prepacked: bool = option("ort-cpu: store weights once more, as this machine's kernels read them", False)

    def __post_init__(self) -> None:
        if self.page < 4096 or self.page & (self.page - 1):
            raise ValueError("page is a power of two of at least 4096 bytes")

    def run(self, op: Operation, context: PassContext) -> None:
        layers = [inner for inner in op.walk() if isinstance(inner, ExpertsOp)]
        if not layers or not isinstance(op, ModuleOp):
            return
        op.attributes[PAGE_ATTRIBUTE] = self.page
        if self.prepacked:
            op.attributes[PREPACKED_ATTRIBUTE] = True
        context.count(self.layers, len(layers))
