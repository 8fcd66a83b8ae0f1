"""What torch does to a symbolic tensor is the expression that computes it; computations are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import core_model_loading as loading

from moec.errors import UnsupportedModelError
from moec.frontend.symbolic_tensor import SymbolicTensor
from moec.weights.context import WeightContext
from moec.weights.expression import Reference
from moec.weights.expression_parser import parse_expression

REAL = {
    "a": torch.randn(4, 6, dtype=torch.bfloat16),
    "b": torch.randn(4, 6, dtype=torch.bfloat16),
    "c": torch.randn(8, 4, 6),
}
CONTEXT = WeightContext(in_memory=REAL)
SYMBOLIC = {name: SymbolicTensor(Reference(name), tensor.shape, tensor.dtype) for name, tensor in REAL.items()}

MOVES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "stack": lambda a, b, c: torch.stack([a, b]),
    "stack last": lambda a, b, c: torch.stack([a, b], dim=-1),
    "cat": lambda a, b, c: torch.cat([a, b, a], dim=-1),
    "cat of one": lambda a, b, c: torch.cat([a]),
    "transpose": lambda a, b, c: c.transpose(-1, 0),
    "transpose twice": lambda a, b, c: c.transpose(1, 2).transpose(2, 1),
    "t": lambda a, b, c: a.t(),
    "T": lambda a, b, c: a.T,
    "mT": lambda a, b, c: c.mT,
    "permute": lambda a, b, c: c.permute(2, 0, -2),
    "permute of nothing": lambda a, b, c: c.permute(0, 1, 2),
    "movedim": lambda a, b, c: c.movedim(0, 2),
    "reshape": lambda a, b, c: c.reshape(2, -1, 6),
    "reshape of transposed": lambda a, b, c: c.transpose(0, 1).reshape(32, 6),
    "view of view": lambda a, b, c: c.view(32, 6).view(8, 24).contiguous(),
    "flatten": lambda a, b, c: c.flatten(1),
    "unflatten": lambda a, b, c: c.unflatten(0, (2, 4)),
    "chunk": lambda a, b, c: c.chunk(3, dim=2)[1],
    "uneven chunk": lambda a, b, c: c.chunk(3, dim=0)[2],
    "split": lambda a, b, c: c.split([1, 5, 2])[1],
    "narrow": lambda a, b, c: c.narrow(2, 1, 3),
    "index": lambda a, b, c: c[3],
    "negative index": lambda a, b, c: c[:, -1],
    "slices": lambda a, b, c: c[1:7:2, :, -4:],
    "everything": lambda a, b, c: c[...],
    "unbind": lambda a, b, c: c.unbind(1)[2],
    "unsqueeze": lambda a, b, c: a.unsqueeze(-1),
    "squeeze": lambda a, b, c: c[2:3].squeeze(0),
    "squeeze all": lambda a, b, c: c[2:3, :, 1:2].squeeze(),
    "none index": lambda a, b, c: a[:, None],
    "clone": lambda a, b, c: c.clone().detach(),
    "to float": lambda a, b, c: a.to(torch.float32),
    "to device": lambda a, b, c: a.to(device="cpu", dtype=None),
    "same type": lambda a, b, c: c.float(),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_recorded(name: str) -> None:
    symbolic = MOVES[name](*SYMBOLIC.values())
    real = MOVES[name](*REAL.values())
    assert isinstance(symbolic, SymbolicTensor)
    assert symbolic.shape == real.shape and symbolic.dtype == real.dtype
    assert torch.equal(CONTEXT.load(symbolic.expression), real)
    assert parse_expression(str(symbolic.expression)) == symbolic.expression


COMPUTES: dict[str, Callable[[Any], Any]] = {
    "aten.add.Tensor": lambda c: c + 1,
    "aten.exp.default": lambda c: torch.exp(c),
    "aten.mul_.Tensor": lambda c: c.mul_(2),
    "aten.index.Tensor": lambda c: c[torch.tensor([1, 0])],
    "aten.flip.default": lambda c: c.flip(0),
    "aten.copy_.default": lambda c: c.copy_(torch.zeros(8, 4, 6)),
    "aten._local_scalar_dense.default": lambda c: c[0, 0, 0].item(),
}


@pytest.mark.parametrize("operation", COMPUTES)
def test_computations_are_refused_by_name(operation: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        COMPUTES[operation](SYMBOLIC["c"])
    assert operation in caught.value.message


def test_tensors_that_do_not_fit_are_named() -> None:
    for operation in (torch.stack, lambda tensors: torch.cat(tensors, dim=1)):
        with pytest.raises(UnsupportedModelError, match=r"a is torch.bfloat16 \[4, 6\]"):
            operation([SYMBOLIC["a"], SymbolicTensor(Reference("short"), (3, 6), torch.bfloat16)])
    with pytest.raises(UnsupportedModelError, match="do not cover"):
        torch.split(SYMBOLIC["a"], [1, 1])


CONFIG = SimpleNamespace(num_attention_heads=2)
OPERATIONS: dict[str, tuple[Any, dict[str, list[str]], list[str], list[str]]] = {
    "interleave": (loading.Interleave(dim=1), {"x": ["c"]}, ["x"], ["y"]),
    "interleave back": (loading.Interleave(dim=2, inverse=True), {"x": ["c"]}, ["x"], ["y"]),
    "permute for rope": (loading.PermuteForRope(), {"x": ["a"]}, ["x"], ["y"]),
    "permute for rope back": (loading.PermuteForRope(inverse=True), {"x": ["a"]}, ["x"], ["y"]),
    "chunk": (loading.Chunk(dim=0), {"x": ["c"]}, ["x"], ["p", "q"]),
    "merge": (loading.MergeModulelist(dim=0), {"x": ["a", "b"]}, ["x"], ["y"]),
    "split modules": (loading.SplitModulelist(dim=1), {"x": ["c"]}, ["x"], ["y.*"]),
    "transpose": (loading.Transpose(1, 2), {"x": ["c"]}, ["x"], ["y"]),
    "concatenate": (loading.Concatenate(dim=1), {"x": ["a"], "z": ["b"]}, ["x", "z"], ["y"]),
    "ernie experts": (
        loading.ErnieFuseAndSplitTextVisionExperts(),
        {"x": ["a", "b"], "z": ["b", "a"]},
        ["x", "z"],
        ["p", "q"],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_conversions_of_transformers(name: str) -> None:
    operation, inputs, sources, targets = OPERATIONS[name]

    def run(tensors: dict[str, Any]) -> dict[str, Any]:
        given = {key: [tensors[item] for item in items] for key, items in inputs.items()}
        result: dict[str, Any] = operation.convert(
            given, source_patterns=sources, target_patterns=targets, config=CONFIG, model=None, full_layer_name="y"
        )
        return result

    real, symbolic = run(REAL), run(SYMBOLIC)
    assert list(real) == list(symbolic)
    for key, value in real.items():
        assert torch.equal(CONTEXT.load(symbolic[key].expression), value), key
