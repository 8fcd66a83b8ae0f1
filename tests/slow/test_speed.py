"""Speed of expert layers, as ratios of times that were measured in turn; the machine should have little else to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.benchmarks import expert_stack, layer_speed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("speed")]

ROUNDS = 11


@pytest.fixture(scope="module")
def stack() -> expert_stack.StackTimes:
    times = expert_stack.measure(ROUNDS)
    print(expert_stack.table(times))
    return times


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[layer_speed.Measured]:
    folder = tmp_path_factory.mktemp("speed")
    subjects = (layer_speed.PORTABLE, layer_speed.ORT_CPU, layer_speed.EXPORT, layer_speed.FUSED_EXPORT)
    times = layer_speed.measure(folder, ROUNDS, subjects)
    print(layer_speed.table(times))
    yield times
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.parametrize("subject", [expert_stack.PORTABLE, expert_stack.ORT_CPU])
class TestStack:
    def test_decoding_reads_at_the_speed_of_memory(self, stack: expert_stack.StackTimes, subject: str) -> None:
        assert stack.decode_ratio(subject) <= 1.2

    def test_prefill_is_as_fast_as_a_dense_stack_that_reads_as_much(
        self, stack: expert_stack.StackTimes, subject: str
    ) -> None:
        assert stack.prefill_bound_ratio(subject) <= 1.2

    def test_prefill_is_as_fast_as_a_dense_block_of_equal_flops(
        self, stack: expert_stack.StackTimes, subject: str
    ) -> None:
        """Against a block as wide as an expert that gets `top_k` rows for every token: as many products of one size.

        The stack that is `top_k` times as wide computes as much and reads an eighth of the weights; the test above
        holds the time against it together with the time to read the rest.
        """
        assert stack.prefill_ratio(subject, expert_stack.ROWS) <= 1.2

    @pytest.mark.parametrize("tokens", [1, 16, 128])
    def test_faster_than_the_grouped_product_of_torch(
        self, stack: expert_stack.StackTimes, subject: str, tokens: int
    ) -> None:
        assert stack.median(subject, tokens) < stack.median(expert_stack.TORCH, tokens)


@pytest.mark.parametrize("peer", [layer_speed.EXPORT, layer_speed.FUSED_EXPORT])
@pytest.mark.parametrize("tokens", layer_speed.TOKEN_COUNTS)
@pytest.mark.parametrize("subject", [layer_speed.PORTABLE, layer_speed.ORT_CPU])
def test_no_slower_than_the_export_of_transformers(
    decoder: layer_speed.Measured, subject: str, tokens: int, peer: str
) -> None:
    assert decoder.median(subject, tokens) <= 1.1 * decoder.median(peer, tokens)
