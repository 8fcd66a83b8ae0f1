"""A user's own nn.Module, with and without experts of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from moec.dialects.moe import ExpertsOp
from moec.errors import UnsupportedModelError, UsageError
from moec.frontend.experts_adapter import ExpertsAdapter, StackedExperts
from moec.frontend.torch_export import load_torch
from moec.ir import verify
from moec.module import Module
from moec.reference.executor import Executor

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DYNAMIC = {"ids": {0: "batch", 1: "seq"}}


class Expert(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(functional.gelu(self.up(x)))
        return result


class Mixture(nn.Module):
    """A loop over experts that torch.export cannot trace."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, count)
        self.experts = nn.ModuleList(Expert(hidden) for _ in range(count))

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, ids = self.router(tokens).softmax(-1).topk(2)
        return gates, ids

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        gates, ids = self.route(tokens)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(ids == index)
            if len(token):
                result.index_add_(0, token, expert(tokens[token]) * gates[token, slot, None])
        return result.view(x.shape)


class StackedMixture(nn.Module):
    """The same idea with one parameter for all experts."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, count)
        self.matrix = nn.Parameter(torch.randn(count, hidden, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        gates, ids = self.router(tokens).softmax(-1).max(-1)
        result = torch.stack([self.matrix[i] @ t * g for t, i, g in zip(tokens, ids, gates, strict=True)])
        return result.view(x.shape)


class Network(nn.Module):
    def __init__(self, block: nn.Module, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.block = block
        self.head = nn.Linear(hidden, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        result: torch.Tensor = self.head(x + self.block(self.norm(x)))
        return result


def _mixture_forward(block: Mixture, run_experts: RunExperts, x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(0, 1)
    gates, ids = block.route(tokens)
    return run_experts(tokens, ids, gates).view(x.shape)


ADAPTER = ExpertsAdapter(Mixture, lambda block: block.experts, _mixture_forward)


def _network(block: type[nn.Module] = Mixture) -> Network:
    torch.manual_seed(0)
    return Network(block(16, 4))


def _run(module: Module, ids: torch.Tensor) -> torch.Tensor:
    (result,) = Executor(module.op, module.weights).run({"ids": ids}).values()
    return result


def test_adapter_makes_the_block_one_operation() -> None:
    network = _network()
    before = dict(network.state_dict())
    example = torch.randint(0, 30, (2, 5))
    module = load_torch(network, (example,), dynamic=DYNAMIC, experts=[ADAPTER], result_names=["logits"])
    verify(module.op)
    (experts,) = [op for op in module.op.walk() if isinstance(op, ExpertsOp)]
    sources = [value.defining_op.attributes for value in experts.weights if value.defining_op is not None]
    assert [source["weight_name"] for source in sources] == [
        f"block.experts.*.{name}" for name in ("up.weight", "up.bias", "down.weight", "down.bias")
    ]
    assert sources[0]["source"] == "stack(0, block.experts.{0:4}.up.weight)"
    assert module.main.result_names == ("logits",)
    ids = torch.randint(0, 30, (3, 7))
    with torch.no_grad():
        assert torch.allclose(_run(module, ids), network(ids), atol=1e-6)
    # the user's module is as it was
    assert network.training
    assert list(network.state_dict()) == list(before)
    assert "forward" not in network.block.__dict__


def test_stacked_parameters() -> None:
    def one_expert(tokens: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return tokens @ matrix.T

    def forward(block: StackedMixture, run_experts: RunExperts, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        gates, ids = block.router(tokens).softmax(-1).max(-1, keepdim=True)
        return run_experts(tokens, ids, gates).view(x.shape)

    network = _network(StackedMixture)
    adapter = ExpertsAdapter(StackedMixture, lambda block: StackedExperts(one_expert, (block.matrix,)), forward)
    module = load_torch(network, (torch.randint(0, 30, (2, 5)),), dynamic=DYNAMIC, experts=[adapter])
    ids = torch.randint(0, 30, (3, 7))
    with torch.no_grad():
        assert torch.allclose(_run(module, ids), network(ids), atol=1e-6)


def test_without_an_adapter_the_loop_is_refused_with_its_line() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be exported") as caught:
        load_torch(_network(), (torch.randint(0, 30, (2, 5)),), dynamic=DYNAMIC)
    assert "Network" in caught.value.where


def _wrong_forward(block: Mixture, run_experts: RunExperts, x: torch.Tensor) -> torch.Tensor:
    return _mixture_forward(block, run_experts, x) * 1.01


def _idle_forward(block: Mixture, run_experts: RunExperts, x: torch.Tensor) -> torch.Tensor:
    return block.route(x)[0]


def _flat_ids(block: Mixture, run_experts: RunExperts, x: torch.Tensor) -> torch.Tensor:
    gates, ids = block.route(x.flatten(0, 1))
    return run_experts(x.flatten(0, 1), ids.flatten(), gates.flatten()).view(x.shape)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (ExpertsAdapter(Mixture, lambda block: block.experts, _wrong_forward), "differs by"),
        (ExpertsAdapter(Mixture, lambda block: block.experts, _flat_ids), "run_experts takes"),
        (ExpertsAdapter(Mixture, lambda block: [*block.experts, nn.Linear(16, 16)], _mixture_forward), "differs in "),
        (ExpertsAdapter(Mixture, lambda block: [], _mixture_forward), "no experts"),
        (ExpertsAdapter(nn.Conv2d, lambda block: [], _mixture_forward), "no part of class Conv2d"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(adapter: ExpertsAdapter, words: str) -> None:
    network = _network()
    with pytest.raises(UsageError, match=words):
        load_torch(network, (torch.randint(0, 30, (2, 5)),), dynamic=DYNAMIC, experts=[adapter])
    assert "forward" not in network.block.__dict__


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] > 8 else x * 3


class Fixing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x[:, 0]
        for index in range(x.shape[1]):
            result = result * x[:, index]
        return result


@pytest.mark.parametrize(("network", "words"), [(Branching(), "right for n in"), (Fixing(), "fixes n")])
def test_code_that_holds_for_some_sizes_only_is_refused(network: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        load_torch(network, (torch.zeros(2, 5),), dynamic={"x": {1: "n"}})
    # with the size fixed it is a module like any other
    assert load_torch(network, (torch.zeros(2, 5),)).main.arguments[0].type.is_static  # type: ignore[attr-defined]


class Smallest(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.topk(torch.sym_min(x.shape[1], 4), dim=1)[0]  # type: ignore[no-untyped-call]


def test_sizes_that_are_the_smaller_of_two() -> None:
    module = load_torch(Smallest(), {"x": torch.zeros(2, 9)}, dynamic={"x": {1: "n"}})
    for width in (2, 3, 4, 5, 30):
        x = torch.randn(2, width)
        (found,) = Executor(module.op, module.weights).run({"x": x}).values()
        assert torch.equal(found, Smallest()(x))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dynamic": {"y": {0: "n"}}}, "dynamic sizes are given for 'y'"),
        ({"dynamic": {"x": {5: "n"}}}, "do not fit"),
        ({"result_names": ["a", "b"]}, "2 result names"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_torch(Branching(), (torch.zeros(2, 5),), **arguments)


def test_other_element_types_are_refused() -> None:
    with pytest.raises(UsageError, match="bfloat16") as caught:
        load_torch(nn.Linear(3, 3).bfloat16(), {"input": torch.zeros(2, 3, dtype=torch.bfloat16)})
    assert "float()" in caught.value.hint
