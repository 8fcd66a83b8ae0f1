"""What a module holds and what a token uses of it: stacks, shared weights, aliases, and weights that layers share."""

from __future__ import annotations

import pytest

from moec.artifact.summary import active_parameters, model_size
from moec.dialects.builtin import WeightOp
from moec.dialects.moe import Routing
from moec.module import Module
from moec.weights.uses import weight_uses
from tests.codegen.running import module_of
from tests.ir.expert_bodies import Kind, affine, constant, dense, latent, low_rank, mixed_layer

HIDDEN = 8


def module(kinds: list[tuple[Kind, tuple[int, ...]]], stored: tuple[int, ...]) -> Module:
    made = mixed_layer(kinds, stored, hidden=HIDDEN, routing=Routing(k=2))
    return module_of(made.op, made.weights)


def test_equal_experts() -> None:
    """Top-2 of 4: half of the experts."""
    found = module([(dense(HIDDEN, 6), (0, 1, 2, 3))], (0, 1, 2, 3))
    expert, router = 3 * HIDDEN * 6, 4 * HIDDEN
    size = model_size(found)
    assert size.parameters == 4 * expert + router
    assert size.bytes == 4 * size.parameters
    assert size.active_flops == 2 * (2 * expert + router)
    assert active_parameters(found) == 2 * expert + router


def test_kinds_and_what_they_share() -> None:
    """Each expert gets half a slot. Bases multiply once per slot, a latent projection of the tokens once per token."""
    kinds = [
        (low_rank(HIDDEN, 6, 2, base=True), (0, 1)),
        (latent(HIDDEN, 6, 3), (2, 3)),
        (constant(HIDDEN), (4, 5)),
        (affine(HIDDEN, 2), (6, 7)),
    ]
    found = module(kinds, tuple(range(8)))
    router = 8 * HIDDEN
    factors, base = 3 * 2 * (HIDDEN + 6), 3 * HIDDEN * 6
    light, offset = 2 * 2 * HIDDEN, HIDDEN
    into, out, inner = 2 * 3 * HIDDEN, HIDDEN * 3, 3 * 6 * 3
    own = factors + inner + offset + light + offset
    assert model_size(found).parameters == router + 2 * own + base + into + out
    # a slot goes to each class with probability 1/4, and there are two slots
    products = router + 0.5 * (factors + base + into + out + inner + light)
    assert model_size(found).active_flops == 2 * products
    assert active_parameters(found) == router + 0.5 * (own + base + into + out)


def test_aliases_and_null_experts() -> None:
    """Six router outputs, three of them to expert 0 and one to nothing."""
    found = module([(dense(HIDDEN, 6), (0, 1))], (0, 0, 0, 1, 1, -1))
    expert, router = 3 * HIDDEN * 6, 6 * HIDDEN
    assert model_size(found).parameters == 2 * expert + router
    assert model_size(found).active_flops == pytest.approx(2 * (2 * (3 + 2) / 6 * expert + router), abs=1)
    # no token reads an expert more than once
    assert active_parameters(found) == pytest.approx((1 + 4 / 6) * expert + router, abs=1)


def test_experts_with_the_same_weights_count_once() -> None:
    """Rows that lie in one tensor, in stacks of different classes and orders."""
    found = module([(dense(HIDDEN, 6), (0, 1)), (dense(HIDDEN, 6, name="again"), (2, 3))], (0, 1, 2, 3))
    whole = model_size(found)
    for op in found.main.body:
        if isinstance(op, WeightOp) and op.weight_name.startswith("again."):
            name = op.weight_name.replace("again", "dense")
            # the experts of the first class in the other order
            op.source = f"concat(0, slice({name}, 0, 1, 2, 1), slice({name}, 0, 0, 1, 1))"
    size = model_size(found)
    assert size.parameters == whole.parameters - 2 * 3 * HIDDEN * 6
    assert size.active_flops == whole.active_flops
    assert len({use.expression for use in weight_uses(found)}) == len(weight_uses(found))
