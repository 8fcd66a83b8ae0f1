"""What an attention mask function of transformers means, found out by asking it about single positions.

transformers describes masks as closures `mask_function(batch, head, query, key) -> bool`. The closures carry no names
to rely on (models compose their own), but a closure can be called: this module evaluates it on chosen positions and
accepts exactly those patterns that `nn.attention_mask` can express.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from moec.errors import UnsupportedModelError

# Farther than any model attends: a window or chunk of this many positions or more is the same as none.
HORIZON = 1 << 22
_PROBED_PADDING = (0, 1, 3)

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class AttentionMaskPattern:
    """Which keys a query may attend to, by position. `window` and `chunk` are 0 where there is none.

    causal: key <= query. window: query - key < window, without `causal` |query - key| < window. chunk: both in the same
    block of `chunk` positions, counted from the first position that is not left padding.
    """

    causal: bool
    window: int = 0
    chunk: int = 0

    def allows(self, query: torch.Tensor, key: torch.Tensor, left_padding: torch.Tensor) -> torch.Tensor:
        """Boolean tensor of the broadcast shape of the three integer tensors."""
        allowed = (query + key + left_padding) >= 0
        if self.causal:
            allowed = allowed & (key <= query)
        if self.window:
            distance = query - key if self.causal else (query - key).abs()
            allowed = allowed & (distance < self.window)
        if self.chunk:
            allowed = allowed & ((query - left_padding) // self.chunk == (key - left_padding) // self.chunk)
        return allowed


def probe_mask_function(mask_function: MaskFunction) -> AttentionMaskPattern:
    """The pattern of a mask function of transformers.

    Tensors inside the closure are replaced by left padding counts, the only per-batch data that such a function may
    depend on here. Raises UnsupportedModelError for every function that is not one of the patterns.
    """
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        left_padding = torch.tensor(_PROBED_PADDING)
        function = _with_tensors(mask_function, left_padding)
        try:
            pattern = _find_pattern(function, left_padding)
        except UnsupportedModelError:
            raise
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the attention mask function could not be evaluated: {error}", where=_describe(mask_function)
            ) from error
    if pattern is None:
        raise UnsupportedModelError(
            "the attention mask is none of: bidirectional, causal, sliding window, chunked",
            where=f"{_describe(mask_function)}; positions 0-7 attend to\n{_picture(mask_function)}",
        )
    return pattern


def _find_pattern(function: MaskFunction, left_padding: torch.Tensor) -> AttentionMaskPattern | None:
    causal = not bool(_ask(function, torch.tensor([0]), torch.tensor([1]))[0, 0, 0])
    extent = _first_query_beyond_reach(function)
    bounds = ({},) if extent is None else ({"window": extent}, {"chunk": extent})
    for bound in bounds:
        pattern = AttentionMaskPattern(causal, **bound)
        if _agrees(function, pattern, left_padding):
            return pattern
    return None


def _first_query_beyond_reach(function: MaskFunction) -> int | None:
    """The first query position that may not see key 0 of an unpadded row, or None if there is none before HORIZON."""
    start, length = 0, 256
    while start < HORIZON:
        queries = torch.arange(start, min(start + length, HORIZON))
        reached = _ask(function, queries, torch.tensor([0]))[0, :, 0]
        if not bool(reached.all()):
            return start + int(reached.to(torch.int8).argmin())
        start, length = start + length, length * 4
    return None


def _agrees(function: MaskFunction, pattern: AttentionMaskPattern, left_padding: torch.Tensor) -> bool:
    extent = pattern.window or pattern.chunk or 16
    marks = torch.tensor([0, extent, 2 * extent, 3 * extent, 7 * extent])
    positions = torch.unique(
        torch.cat([torch.arange(24), (marks[:, None] + torch.arange(-4, 5)).flatten()]).clamp(min=0)
    )
    # Before its first token a padded row has no meaning, and floor division of negative numbers differs between users.
    positions = positions[positions >= max(_PROBED_PADDING)]
    seen = _ask(function, positions, positions)
    expected = pattern.allows(positions[None, :, None], positions[None, None, :], left_padding[:, None, None])
    return bool((seen == expected).all())


def _ask(function: MaskFunction, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Boolean tensor [rows, queries, keys]."""
    rows = torch.arange(len(_PROBED_PADDING))[:, None, None, None]
    heads = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    seen = function(rows, heads, queries[None, None, :, None], keys[None, None, None, :])
    return torch.as_tensor(seen).expand(len(_PROBED_PADDING), 1, len(queries), len(keys))[:, 0]


def _with_tensors(value: Any, replacement: torch.Tensor) -> Any:
    """A copy of a closure in which every captured tensor, also inside captured closures, is `replacement`."""
    if isinstance(value, torch.Tensor):
        return replacement
    if isinstance(value, tuple | list):
        return type(value)(_with_tensors(item, replacement) for item in value)
    if isinstance(value, types.FunctionType) and value.__closure__:
        cells = tuple(types.CellType(_with_tensors(cell.cell_contents, replacement)) for cell in value.__closure__)
        return types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    return value


def _describe(function: MaskFunction) -> str:
    module, name = getattr(function, "__module__", "?"), getattr(function, "__qualname__", repr(function))
    return f"mask function {module}.{name}"


def _picture(function: MaskFunction) -> str:
    with _disable_current_modes(), torch.no_grad():
        positions = torch.arange(8)
        table = _ask(_with_tensors(function, torch.tensor(_PROBED_PADDING)), positions, positions)[0]
    return "\n".join("".join("x" if seen else "." for seen in row) for row in table.tolist())
