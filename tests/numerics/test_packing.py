"""Codes in bytes: every packing gives back what went in, and lies as the formats say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.dialects.quant import BlockScale, Element
from moec.quantization.dictionary import build_dictionary, decode_stream, encode_rows, pack_stream, stream_problem
from moec.quantization.packing import pack_bits, pack_trits, unpack_bits, unpack_trits
from moec.quantization.small_floats import element_values, nearest_elements, scale_values

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 37))


def random_codes(shape: tuple[int, ...], limit: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, limit, shape))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 16), st.integers(0, 1000))
def test_bits_come_back(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(shape, 1 << bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], -(-shape[1] * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, shape[1]).long(), codes)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 16), st.integers(0, 1000))
def test_the_first_code_has_the_lowest_bits(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(shape, 1 << bits, seed)
    for row, packed in zip(codes.tolist(), pack_bits(codes, bits), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert number.to_bytes(len(packed), "little") == bytes(packed.tolist())


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_trits_come_back(shape: tuple[int, int], seed: int) -> None:
    trits = random_codes(shape, 3, seed)
    packed = pack_trits(trits)
    assert packed.shape == (shape[0], -(-shape[1] // 5))
    assert int(packed[0, 0]) == sum(int(trit) * 3**place for place, trit in enumerate(trits[0, :5]))
    assert torch.equal(unpack_trits(packed, shape[1]).long(), trits)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("zero_share", [0.3, 0.7, 0.885, 0.98])
def test_a_stream_gives_back_its_rows(bits: int, zero_share: float) -> None:
    dictionary = build_dictionary(bits, zero_share)
    table = dictionary.table()
    other = (1 - zero_share) / 2
    for shape in ((1, 1), (1, 57), (6, 64), (5, 301)):
        trits = np.random.default_rng(0).choice(3, size=shape, p=[zero_share, other, other]).astype(np.uint8)
        trits[0] = 0
        if len(trits) > 2:
            trits[1], trits[2] = 1, 2
        codes, offsets = encode_rows(torch.from_numpy(trits), dictionary)
        stream = pack_stream(codes, bits)
        assert stream_problem(stream, offsets, table, bits, shape[1]) is None
        assert np.array_equal(decode_stream(stream, offsets, table, bits, shape[1]).numpy(), trits)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("zero_share", [0.5, 0.885, 0.98])
def test_a_dictionary_has_its_prefixes_and_all_pairs(bits: int, zero_share: float) -> None:
    dictionary = build_dictionary(bits, zero_share)
    keys = set(dictionary.keys.tolist())
    assert len(keys) == len(dictionary.keys) == 1 << bits
    assert set(range(9, 18)) <= keys
    assert all(key // 9 in keys or key // 9 == 1 for key in keys)
    assert dictionary.lengths.min() >= 1 and dictionary.lengths.max() <= 14


def test_a_dictionary_is_that_of_a_heap() -> None:
    """Best-first enumeration, as the paper describes it, gives the same 1024 sequences up to equal probabilities."""
    import heapq

    share = 0.885
    trit = [share, (1 - share) / 2, (1 - share) / 2]
    symbol = [trit[pair % 3] * trit[pair // 3] for pair in range(9)]
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    probabilities: list[float] = []
    while len(probabilities) < 1024:
        probability, sequence = heapq.heappop(heap)
        if sequence:
            probabilities.append(-probability)
        if len(sequence) < 14:
            for pair in range(9):
                heapq.heappush(heap, (probability * symbol[pair], (*sequence, pair)))
    found = []
    for key in build_dictionary(10, share).keys.tolist():
        product = 1.0
        while key > 1:
            product *= symbol[key % 9]
            key //= 9
        found.append(product)
    # the nine pairs are all there; where the heap misses one, the least probable sequence made room
    assert np.allclose(sorted(found, reverse=True)[:1015], sorted(probabilities, reverse=True)[:1015])


def test_damaged_streams_are_found() -> None:
    dictionary = build_dictionary(8, 0.8)
    table = dictionary.table()
    trits = torch.from_numpy(np.random.default_rng(0).choice(3, size=(4, 40), p=[0.8, 0.1, 0.1]).astype(np.uint8))
    codes, offsets = encode_rows(trits, dictionary)
    stream = pack_stream(codes, 8)
    assert stream_problem(stream, offsets, table, 8, 40) is None
    assert "do not stand for 42" in str(stream_problem(stream, offsets, table, 8, 42))
    assert "ascend" in str(stream_problem(stream, offsets.flip(0), table, 8, 40))
    assert "bytes" in str(stream_problem(stream[:-1], offsets, table, 8, 40))
    moved = offsets.clone()
    moved[2] += 1
    assert "do not stand for 40" in str(stream_problem(stream, moved, table, 8, 40))
    broken = table.clone()
    broken[3, 0] = 0xFF
    assert "no sequence" in str(stream_problem(stream, offsets, broken, 8, 40))


@pytest.mark.parametrize("element", list(Element))
def test_small_floats_are_their_own_nearest(element: Element) -> None:
    values = element_values(element)
    finite = values.isfinite() & ~(values.signbit() & (values == 0))
    codes = nearest_elements(values[finite], element)
    assert torch.equal(element_values(element)[codes.long()], values[finite])


def test_small_floats_round_to_even_and_saturate() -> None:
    given_values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e30, -5.0, -1e30])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -4.0, -6.0])
    assert torch.equal(element_values(Element.E2M1)[nearest_elements(given_values, Element.E2M1).long()], expected)


def test_scales_of_blocks() -> None:
    powers = scale_values(BlockScale.E8M0)
    assert powers[127] == 1 and powers[0] == 2.0**-127 and powers[254] == 2.0**127 and powers[255].isnan()
    assert scale_values(BlockScale.E4M3)[0x38] == 1
