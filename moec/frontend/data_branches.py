"""Branches of a model's code on values of tensors, such as `if torch.max(position_ids) > trained_length`.

A trace takes one side of a branch. Where the two sides compute the same (the published PhiMoE has one scale for short
and long texts), it is right all the same; that is found out by tracing with every answer yes, then with every one no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode

from moec.errors import UnsupportedModelError


class _Answering(TorchFunctionMode):
    """Answers `bool(comparison)` with `answer`. A number is taken as not zero: it is a length or a count of tokens."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return self._answer if args[0].dtype == torch.bool else True
        return function(*args, **(kwargs or {}))


def trace_both_sides(trace: Callable[[], ExportedProgram], where: str) -> ExportedProgram:
    """The decomposed program that `trace` gives for either answer to every branch on values.

    Raises UnsupportedModelError if the answer makes a difference.
    """
    programs = []
    for answer in (True, False):
        with _Answering(answer):
            programs.append(trace())
    yes, no = programs
    if _text(yes) != _text(no):
        raise UnsupportedModelError(
            "the model's code branches on values of its inputs, and the branches differ",
            where=where,
            hint="rotary embeddings that change with the length of the text are not supported for this model",
        )
    return yes


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the parts of `model` hold what they held before: traced code may store traced tensors in them."""
    saved = [(part, dict(part.__dict__), dict(part._parameters), dict(part._buffers)) for part in model.modules()]
    try:
        yield
    finally:
        for part, attributes, parameters, buffers in saved:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)


def _text(program: ExportedProgram) -> str:
    """The program in a form that is equal for equal computations, however its constants are named."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            held = program.constants.get(spec.target) if spec.kind is InputKind.CONSTANT_TENSOR else None
            names[node] = (
                f"constant {held.tolist()}" if isinstance(held, torch.Tensor) else str(spec.target or node.name)
            )
        else:
            names[node] = f"%{len(lines)}"
            arguments = fx.map_arg((node.args, node.kwargs), lambda used: names[used])
            lines.append(f"{node.op} {node.target} {arguments}")
    return "\n".join(lines)
