"""Marks the expert block of a user's own module, so that it becomes `moe.experts`.

A user's block usually loops over experts with data-dependent sizes, which cannot be traced. An adapter says where its
experts are and computes its forward with a given function in place of the loop; routing stays the user's own code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from moec.errors import UsageError
from moec.frontend.expert_body import ExpertFunction, trace_expert
from moec.weights.expression import Expression, Reference, Stack

# (tokens [T, H], ids [T, K] int64, gates [T, K]) -> [T, H]: the gated sum of the experts' outputs.
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_STAND_IN = "moec_stack_"


@dataclass(frozen=True)
class StackedExperts:
    """Experts held as parameters [experts, ...]: `function(tokens [T, H], *slices) -> [T, H]` computes one of them."""

    function: ExpertFunction
    stacks: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class ExpertsAdapter:
    """How to trace every module of the class `block`.

    `experts(block)` gives its experts: modules of equal structure that map [T, H] to [T, H], or `StackedExperts`.
    `forward(block, run_experts, *arguments)` is the block's forward, with `run_experts` in place of its loop.
    """

    block: type[nn.Module]
    experts: Callable[[Any], Sequence[nn.Module] | StackedExperts]
    forward: Callable[..., Any]


@dataclass(frozen=True)
class StackSource:
    """How people know a stack (`moe.experts.*.up.weight` for separate experts) and what it is made from."""

    name: str
    expression: Expression


@dataclass
class _Marked:
    """One block of the module, its experts as a function of slices, and what was learned by running it."""

    name: str
    block: nn.Module
    adapter: ExpertsAdapter
    experts: StackedExperts
    sources: tuple[StackSource, ...]
    hidden_size: int = 0


@dataclass
class MarkedBlocks:
    """All blocks of a module that adapters mark."""

    blocks: list[_Marked] = field(default_factory=list)

    @contextmanager
    def computing_directly(self) -> Iterator[None]:
        """While open, the blocks compute the adapters' forward on real tensors, expert by expert."""
        with self._forwards(self._run_directly):
            yield

    @contextmanager
    def standing_for_experts(self) -> Iterator[dict[str, StackSource]]:
        """While open, the blocks call `moec::experts`. Gives what the stand-in parameters stand for, by their names."""
        sources: dict[str, StackSource] = {}
        bodies: dict[str, str] = {}
        try:
            for marked in self.blocks:
                stacks = [(f"stack {index}", stack.shape[1:]) for index, stack in enumerate(marked.experts.stacks)]
                bodies[marked.name] = trace_expert(
                    marked.experts.function, stacks, marked.hidden_size, marked.name
                ).digest
                for index, (stack, source) in enumerate(zip(marked.experts.stacks, marked.sources, strict=True)):
                    # never written or read: tracing needs its shape
                    empty = nn.Parameter(torch.empty(stack.shape, dtype=stack.dtype), requires_grad=False)
                    marked.block.register_parameter(f"{_STAND_IN}{index}", empty)
                    sources[f"{marked.name}.{_STAND_IN}{index}".lstrip(".")] = source

            def call_operation(marked: _Marked) -> RunExperts:
                body = bodies[marked.name]

                def run(tokens: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
                    # read here: torch.export puts its own parameters in place while it traces
                    stand_ins = [getattr(marked.block, f"{_STAND_IN}{i}") for i in range(len(marked.sources))]
                    result: torch.Tensor = torch.ops.moec.experts(tokens, ids, gates, stand_ins, body)
                    return result

                return run

            with self._forwards(call_operation):
                yield sources
        finally:
            for marked in self.blocks:
                for name in [name for name in marked.block._parameters if name.startswith(_STAND_IN)]:
                    del marked.block._parameters[name]

    @contextmanager
    def _forwards(self, make: Callable[[_Marked], RunExperts]) -> Iterator[None]:
        try:
            for marked in self.blocks:
                marked.block.forward = _bind(marked, make(marked))
            yield
        finally:
            for marked in self.blocks:
                marked.block.__dict__.pop("forward", None)

    def _run_directly(self, marked: _Marked) -> RunExperts:
        def run(tokens: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            if tokens.ndim != 2 or ids.ndim != 2 or ids.shape != gates.shape or len(ids) != len(tokens):
                raise UsageError(
                    f"run_experts takes tokens [T, H], ids [T, K] and gates [T, K], not {tuple(tokens.shape)}, "
                    f"{tuple(ids.shape)} and {tuple(gates.shape)}",
                    where=marked.name,
                )
            marked.hidden_size = int(tokens.shape[1])
            result = torch.zeros_like(tokens)
            for expert in sorted(set(ids.flatten().tolist())):
                token, slot = torch.where(ids == expert)
                slices = [stack[expert] for stack in marked.experts.stacks]
                result.index_add_(0, token, marked.experts.function(tokens[token], *slices) * gates[token, slot, None])
            return result

        return run


def mark_blocks(module: nn.Module, adapters: Sequence[ExpertsAdapter]) -> MarkedBlocks:
    """Finds the blocks that the adapters mark.

    Raises UsageError for an adapter that fits no block, and for experts of one block that differ in structure.
    """
    names = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
    found = MarkedBlocks()
    for adapter in adapters:
        blocks = [(name, part) for name, part in module.named_modules() if isinstance(part, adapter.block)]
        if not blocks:
            raise UsageError(
                f"the module has no part of class {adapter.block.__name__}, which an experts adapter names",
                hint="name the class of the block that holds the experts",
            )
        for name, block in blocks:
            given = adapter.experts(block)
            if isinstance(given, StackedExperts):
                own = [names[id(stack)] for stack in given.stacks]
                sources = tuple(StackSource(stack, Reference(stack)) for stack in own)
                found.blocks.append(_Marked(name, block, adapter, given, sources))
            else:
                found.blocks.append(_mark_modules(name, block, adapter, list(given), names))
    return found


def _mark_modules(
    name: str, block: nn.Module, adapter: ExpertsAdapter, experts: list[nn.Module], names: dict[int, str]
) -> _Marked:
    tensors = [dict(expert.state_dict(keep_vars=True)) for expert in experts]
    if not tensors:
        raise UsageError("the adapter gives no experts", where=name)
    shapes = [{key: (tensor.shape, tensor.dtype) for key, tensor in each.items()} for each in tensors]
    for index, shape in enumerate(shapes):
        if shape != shapes[0] or type(experts[index]) is not type(experts[0]):
            raise UsageError(f"expert {index} differs in structure from expert 0", where=name)
    keys = list(tensors[0])

    def one_expert(tokens: torch.Tensor, *slices: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = functional_call(experts[0], dict(zip(keys, slices, strict=True)), (tokens,))
        return result

    stacks = tuple(
        nn.Parameter(torch.stack([each[key].detach() for each in tensors]), requires_grad=False) for key in keys
    )
    sources = []
    for key in keys:
        own = [names[id(each[key])] for each in tensors]
        shown = re.sub(rf"\.?\d+\.{re.escape(key)}$", f".*.{key}", own[0])
        sources.append(StackSource(shown, Stack(0, tuple(map(Reference, own)))))
    return _Marked(name, block, adapter, StackedExperts(one_expert, stacks), tuple(sources))


def _bind(marked: _Marked, run: RunExperts) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        return marked.adapter.forward(marked.block, run, *arguments, **keywords)

    return forward
