"""What a router may read instead of hidden states: products of neurons, a hidden layer, a table of tokens.

Each gives rows [..., E] in front of the router, which then is the identity: outputs can still be dropped, moved and
trained like those of any linear router.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.dialects.builtin import ModuleOp
from moec.errors import UsageError
from moec.experts import FeedForward, MoeLayer
from moec.experts.expert import WIDTH, Activation
from moec.experts.parts import new_weight, store_tensor
from moec.ir import Operation, TensorType, Value
from moec.passes.building import Builder
from moec.passes.matching import made_by, shape, tensor
from moec.weights.context import WeightContext

_TOKENS_INPUT = "input_ids"


class FeatureBuilder:
    """Inserts operations in front of the router of a layer."""

    def __init__(self, layer: MoeLayer, weights: WeightContext) -> None:
        self._layer = layer
        self._weights = weights
        self._build = Builder(lambda made: made.insert_before(layer.router))
        self.rows = layer.router.tensor("input")

    def neurons(self, activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> Value:
        """|sigma(x G^T) * (x U^T)| [..., E] of representative neurons, whose rows are `gate` and `up` [E, H] (CMoE)."""
        named = [("neurons.gate", gate), ("neurons.up", up)]
        products = [self._linear(name, weight) for name, weight in named if weight is not None]
        hidden = self._activated(activation, products)
        return self._build.aten("abs.default", {"self": hidden}, tensor(hidden))

    def hidden_layer(self, weight: torch.Tensor) -> Value:
        """tanh(x W^T) [..., E] for W [E, H] (MoEfication)."""
        product = self._linear("hidden", weight)
        return self._build.aten("tanh.default", {"self": product}, tensor(product))

    def token_rows(self, function: ModuleOp, table: torch.Tensor) -> Value:
        """Row `table[token]` [..., E] for the model's own input, so that nothing of the layer decides. `table` [V, E].

        Raises UsageError for a model without token ids.
        """
        ids = token_input(function)
        weight = self._weight("tokens", table)
        kind = TensorType((*shape(ids), table.shape[1]), tensor(self.rows).dtype)
        found = self._build.aten("embedding.default", {"weight": weight, "indices": ids}, kind, padding_idx=-1,
                                 scale_grad_by_freq=False, sparse=False)  # fmt: skip
        return self._build.view(found, (*shape(self.rows)[:-1], table.shape[1]))

    def _weight(self, name: str, value: torch.Tensor) -> Value:
        full = f"{self._layer.name}.router.{name}"
        return new_weight(self._layer, full, store_tensor(self._weights, value), tuple(value.shape))

    def _linear(self, name: str, weight: torch.Tensor) -> Value:
        kind = TensorType((*shape(self.rows)[:-1], len(weight)), tensor(self.rows).dtype)
        return self._build.aten("linear.default", {"input": self.rows, "weight": self._weight(name, weight)}, kind)

    def _activated(self, activation: Activation, given: Sequence[Value]) -> Value:
        """The function of the experts' bodies on other values."""
        mapping: dict[Value, Value] = dict(zip(activation.block.arguments, given, strict=True))
        sizes = shape(given[0])
        for op in activation.block:
            if op is activation.block.last:
                continue
            copy = op.clone(mapping)
            for result in copy.results:
                assert isinstance(result.type, TensorType)
                if WIDTH in result.type.shape:
                    result.type = TensorType(sizes, result.type.dtype)
            self._build.insert(copy)
        return mapping[activation.block.terminator.operands[0]]


def token_input(function: ModuleOp) -> Value:
    """The argument with token ids [batch, seq]; raises UsageError for a model that has none."""
    if _TOKENS_INPUT not in function.main.arg_names:
        raise UsageError(f"the model has no input {_TOKENS_INPUT}", hint="a table of tokens needs token ids")
    return function.main.argument(_TOKENS_INPUT)


def token_embedding(function: ModuleOp, weights: WeightContext) -> torch.Tensor:
    """The model's own embedding of its tokens, float32 [V, D]; raises UsageError where there is none."""
    ids = token_input(function)
    for user in _readers(ids):
        if user.name == "aten.embedding.default":
            weight = user.operands[0].defining_op
            if weight is not None and "source" in weight.attributes:
                return weights.load(str(weight.attributes["source"])).float()
    raise UsageError("the model's tokens have no table of embeddings", hint="choose another kind of router")


def _readers(value: Value) -> Sequence[Operation]:
    """The operations that read a value, or a view of it."""
    found: list[Operation] = []
    for user in value.users:
        found.append(user)
        if user.results and made_by(user.results[0], "view.default", "_to_copy.default") is not None:
            found += _readers(user.results[0])
    return found


def representatives(experts: Sequence[FeedForward], chosen: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(gate, up) rows of length 1, [E, H] each, of one neuron of each expert; gate is None where they have none."""

    def rows(part: str) -> torch.Tensor:
        found = [getattr(expert, part).dense()[number] for expert, number in zip(experts, chosen, strict=True)]
        return torch.nn.functional.normalize(torch.stack(found).double(), dim=1)

    return None if experts[0].gate is None else rows("gate"), rows("up")


def neuron_features(
    activation: Activation, gate: torch.Tensor | None, up: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """What `FeatureBuilder.neurons` computes of rows [n, H]: [n, E]."""
    return activation.compute(None if gate is None else rows @ gate.float().T, rows @ up.float().T).abs()


def hidden_features(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What `FeatureBuilder.hidden_layer` computes of rows [n, H]: [n, E]."""
    return (rows @ weight.T).tanh()
