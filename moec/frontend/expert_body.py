"""The computation of one expert, traced from the module that holds all of them.

A module of stacked experts (transformers' `@use_experts_implementation`, or one that a user marks) holds parameters
`[experts, ...]`. Its body maps tokens `[tokens, hidden]` and one slice of each stack to outputs `[tokens, hidden]`. The
body is traced from the module's own activation and gate, so that nothing here knows activations by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional

from moec.errors import UnsupportedModelError
from moec.frontend.decompositions import decompose

ExpertFunction = Callable[..., torch.Tensor]

TOKENS = "tokens"


@dataclass(frozen=True)
class ExpertBody:
    """One expert: `program` maps (tokens [tokens, H], one slice per name in `stacks`) to [tokens, H]."""

    digest: str
    stacks: tuple[str, ...]
    program: ExportedProgram

    def run(self, tokens: torch.Tensor, slices: Iterable[torch.Tensor]) -> torch.Tensor:
        """The expert's output [tokens, H] on real tensors."""
        result = torch.fx.Interpreter(self.program.graph_module).run(*self._lifted(), tokens, *slices)
        output: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
        return output

    def _lifted(self) -> list[torch.Tensor]:
        constants = {**self.program.state_dict, **self.program.constants}
        signature = self.program.graph_signature
        return [constants[spec.target] for spec in signature.input_specs if spec.target is not None]


class _OneExpert(nn.Module):
    """Presents a function of (tokens, *slices) to torch.export as a module that owns no parameters."""

    def __init__(self, function: ExpertFunction) -> None:
        super().__init__()
        self._function = function

    def forward(self, tokens: torch.Tensor, slices: list[torch.Tensor]) -> torch.Tensor:
        return self._function(tokens, *slices)


_BODIES: dict[str, ExpertBody] = {}


def body_of(digest: str) -> ExpertBody:
    """The body that `trace_expert` made under this digest."""
    return _BODIES[digest]


def trace_expert(
    function: ExpertFunction, stacks: Sequence[tuple[str, torch.Size]], hidden_size: int, where: str
) -> ExpertBody:
    """Traces `function(tokens [tokens, hidden_size], *slices)` where the slices have the given (name, shape).

    Equal computations give the same object. Raises UnsupportedModelError, naming `where`, if it cannot be traced or
    does not map [tokens, hidden_size] to the same shape.
    """
    example = torch.zeros(3, hidden_size, device="meta")
    slices = [torch.zeros(shape, device="meta") for _, shape in stacks]
    dynamic = {"tokens": {0: Dim(TOKENS, min=2)}, "slices": [None] * len(slices)}
    try:
        with torch.no_grad():
            program = export(_OneExpert(function), (example, slices), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"the computation of one expert could not be traced: {_first_line(error)}",
            where=where,
            hint="the expert must be a function of its tokens and of one slice of each stacked parameter",
        ) from error
    program = decompose(program)
    output = next(iter(program.graph.find_nodes(op="output"))).args[0][0].meta["val"]
    if output.ndim != 2 or output.shape[1] != hidden_size:
        raise UnsupportedModelError(f"one expert maps {hidden_size} features to {tuple(output.shape)}", where=where)
    text = program.graph_module.print_readable(print_output=False) + repr(
        [(name, tuple(shape)) for name, shape in stacks]
    )
    constants = [value for value in program.constants.values() if isinstance(value, torch.Tensor)]
    digest = hashlib.sha256(text.encode())
    for constant in constants:
        digest.update(constant.detach().cpu().contiguous().numpy().tobytes())
    return _BODIES.setdefault(
        digest.hexdigest()[:16], ExpertBody(digest.hexdigest()[:16], tuple(name for name, _ in stacks), program)
    )


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module follows the contract of transformers' `use_experts_implementation`."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))


def stacked_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The stacks of such a module, in the order in which its body takes their slices."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj"]
    if module.has_bias:
        names = [up, f"{up}_bias", "down_proj", "down_proj_bias"]
    return [(name, module.get_parameter(name)) for name in names]


def trace_stacked_experts(module: Any, where: str) -> ExpertBody:
    """The body of a module that `is_stacked_experts`."""

    def one_expert(tokens: torch.Tensor, *slices: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, slices, strict=True))
        hidden = _project(tokens, given[up], given.get(f"{up}_bias"))
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        hidden = _project(hidden, given["down_proj"], given.get("down_proj_bias"))
        return module.post_expert_norm(hidden) if getattr(module, "has_post_expert_norm", False) else hidden

    def _project(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(values, weight.T if module.is_transposed else weight, bias)

    parameters = stacked_parameters(module)
    names = [name for name, _ in parameters]
    up = names[0]
    down = dict(parameters)["down_proj"]
    hidden_size = int(down.shape[2 if module.is_transposed else 1])
    used = set(names)
    for name, _ in module.named_parameters():
        if name not in used:
            raise UnsupportedModelError(
                f"parameter {name!r} of an expert block is not one of its stacks {sorted(used)}", where=where
            )
    return trace_expert(one_expert, [(name, parameter.shape[1:]) for name, parameter in parameters], hidden_size, where)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
