"""Trits as a stream of codes for runs of them: the codec of QMoE (arXiv 2310.16795, section 4).

A dictionary holds the 2^bits most probable sequences of 1 to 14 pairs of trits, if trits are independent and zero with
a given probability. So it has every prefix of what it has; the nine single pairs are added where they are missing,
which makes every row encodable. Rows are cut greedily, each on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from moec.dialects.quant import MAX_PAIRS
from moec.quantization.packing import pack_bits, unpack_bits

_SYMBOLS = 9
_PAIRS_PER_WORD = 7


@dataclass(frozen=True, eq=False)
class Dictionary:
    """2^code_bits sequences of pairs, by descending probability. A pair of trits a, b is the symbol a + 3 b.

    `keys` int64: the symbols of a sequence as digits to the base 9 behind a leading one. `lengths` int64, in pairs.
    """

    code_bits: int
    zero_share: float
    keys: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @cached_property
    def children(self) -> npt.NDArray[np.int32]:
        """[2^code_bits + 1, 9]: the code of a sequence and one more symbol, -1 where there is none; last the empty
        sequence."""
        count = len(self.keys)
        order = np.argsort(self.keys)
        parents = self.keys // _SYMBOLS
        places = np.searchsorted(self.keys, parents, sorter=order)
        numbers = np.where(parents == 1, count, order[np.minimum(places, count - 1)])
        table = np.full((count + 1, _SYMBOLS), -1, np.int32)
        table[numbers, self.keys % _SYMBOLS] = np.arange(count, dtype=np.int32)
        return table

    def table(self) -> torch.Tensor:
        """The operand `table` of `quant.dequant`: u8 [2^code_bits, 8]."""
        words = np.zeros((len(self.keys), 2), np.uint32)
        for pair in range(int(self.lengths.max())):
            left = self.lengths - pair
            symbol = np.where(left > 0, self.keys // _SYMBOLS ** np.maximum(left - 1, 0) % _SYMBOLS, 0)
            trits = (symbol % 3 + 4 * (symbol // 3)).astype(np.uint32)
            words[:, pair // _PAIRS_PER_WORD] |= trits << np.uint32(4 + 4 * (pair % _PAIRS_PER_WORD))
        words |= self.lengths.astype(np.uint32)[:, None]
        return torch.from_numpy(words.astype("<u4").view(np.uint8).reshape(len(words), 8).copy())


@lru_cache(maxsize=16)
def build_dictionary(code_bits: int, zero_share: float) -> Dictionary:
    """The dictionary for trits that are zero with the probability `zero_share` in (0, 1), and of either sign alike.

    Equal probabilities are ordered by length, then by symbols.
    """
    count = 1 << code_bits
    zero, other = -np.log2(zero_share), -np.log2((1 - zero_share) / 2)
    symbols = np.arange(_SYMBOLS)
    nonzero = (symbols % 3 > 0).astype(np.int64) + (symbols // 3 > 0)
    level_keys, level_nonzero = np.ones(1, np.int64), np.zeros(1, np.int64)
    keys = lengths = np.empty(0, np.int64)
    costs = np.empty(0)
    for length in range(1, MAX_PAIRS + 1):
        level_keys = (level_keys[:, None] * _SYMBOLS + symbols).ravel()
        level_nonzero = (level_nonzero[:, None] + nonzero).ravel()
        cost = level_nonzero * other + (2 * length - level_nonzero) * zero
        if len(costs) >= count:
            likely = cost <= costs.max()
            level_keys, level_nonzero, cost = level_keys[likely], level_nonzero[likely], cost[likely]
        keys, costs = np.concatenate([keys, level_keys]), np.concatenate([costs, cost])
        lengths = np.concatenate([lengths, np.full(len(level_keys), length)])
        chosen = np.lexsort((keys, lengths, costs))[:count]
        keys, costs, lengths = keys[chosen], costs[chosen], lengths[chosen]
        # what is not among the best cannot be continued to one of the best
        kept = np.isin(level_keys, keys[lengths == length])
        level_keys, level_nonzero = level_keys[kept], level_nonzero[kept]
    single = _SYMBOLS + symbols
    missing = single[~np.isin(single, keys)]
    if len(missing):
        droppable = np.flatnonzero(lengths > 1)[-len(missing) :]
        missing_costs = nonzero[missing - _SYMBOLS] * other + (2 - nonzero[missing - _SYMBOLS]) * zero
        keys = np.concatenate([np.delete(keys, droppable), missing])
        costs = np.concatenate([np.delete(costs, droppable), missing_costs])
        lengths = np.concatenate([np.delete(lengths, droppable), np.ones(len(missing), np.int64)])
        chosen = np.lexsort((keys, lengths, costs))
        keys, lengths = keys[chosen], lengths[chosen]
    return Dictionary(code_bits, zero_share, keys, lengths)


def encode_rows(trits: torch.Tensor, dictionary: Dictionary) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int32 of all rows in order, offsets i32 [N + 1]) of trits [N, K]; an odd row gets a trit 0 behind it.

    Every row is cut into the longest sequences that the dictionary has, from its start.
    """
    given = np.ascontiguousarray(trits.numpy())
    if given.shape[1] % 2:
        given = np.pad(given, ((0, 0), (0, 1)))
    symbols = np.ascontiguousarray((given[:, 0::2] + 3 * given[:, 1::2]).T.astype(np.int64))
    children = dictionary.children
    root = len(children) - 1
    steps, rows = symbols.shape
    node = np.full(rows, root, np.int64)
    codes = np.full((steps + 1, rows), -1, np.int32)
    for step in range(steps):
        following = children[node, symbols[step]]
        ends = following < 0
        codes[step] = np.where(ends, node, -1)
        node = np.where(ends, children[root, symbols[step]], following)
    codes[steps] = node
    emitted = codes >= 0
    offsets = np.zeros(rows + 1, np.int32)
    np.cumsum(emitted.sum(0), out=offsets[1:])
    return torch.from_numpy(codes.T[emitted.T]), torch.from_numpy(offsets)


def pack_stream(codes: torch.Tensor, code_bits: int) -> torch.Tensor:
    """The operand `codes` of a stream, u8 [bytes]."""
    return pack_bits(codes, code_bits)


def decode_stream(
    codes: torch.Tensor, offsets: torch.Tensor, table: torch.Tensor, code_bits: int, columns: int
) -> torch.Tensor:
    """Trits u8 [N, columns] of a stream without problems."""
    sequences, lengths = _expanded(table)
    numbers = unpack_bits(codes, code_bits, int(offsets[-1])).long()
    used = torch.arange(sequences.shape[1]) < 2 * lengths[numbers, None]
    return sequences[numbers][used].reshape(len(offsets) - 1, -1)[:, :columns]


def stream_problem(
    codes: torch.Tensor, offsets: torch.Tensor, table: torch.Tensor, code_bits: int, columns: int
) -> str | None:
    """Why a stream does not give rows of `columns` trits, in words; None where it does."""
    starts = offsets.long()
    if int(starts[0]) or bool((starts[1:] < starts[:-1]).any()):
        return "the offsets of its rows do not ascend from 0"
    count = int(starts[-1])
    if len(codes) * 8 < count * code_bits:
        return f"{len(codes)} bytes do not hold {count} codes of {code_bits} bits"
    sequences, lengths = _expanded(table)
    if bool((lengths < 1).any() | (lengths > MAX_PAIRS).any() | (sequences > 2).any()):
        return "an entry of its dictionary is no sequence of trits"
    singles = sequences[lengths == 1][:, 0] + 3 * sequences[lengths == 1][:, 1]
    if singles.sort().values.tolist() != list(range(_SYMBOLS)):
        return "its dictionary does not have each pair of trits once"
    pairs = lengths[unpack_bits(codes, code_bits, count).long()].cumsum(0)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), pairs])
    if bool((ends[starts[1:]] - ends[starts[:-1]] != -(-columns // 2)).any()):
        return f"the codes of a row do not stand for {columns} trits"
    return None


def _expanded(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(trits u8 [entries, 28], lengths in pairs int64 [entries]) of the operand `table`."""
    nibbles = unpack_bits(table, 4, 16)
    pairs = torch.cat([nibbles[:, 1:8], nibbles[:, 9:16]], dim=1)
    trits = torch.stack([pairs & 3, pairs >> 2], dim=2).flatten(1)
    return trits, nibbles[:, 0].long()
