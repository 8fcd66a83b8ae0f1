"""Where each expert goes in the report's drawing, and how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.artifact.expert_rows import ExpertRow, expert_rows
from moec.artifact.report import LayerFacts

_LEFT, _RIGHT = 170, 950
_ROW_HEIGHT, _BAR_HEIGHT, _LEAST_HEIGHT = 48, 26.0, 3.0
_WIDEST_BAR = 22.0
_COLOURS = {
    "low-rank": "var(--b)", "latent": "var(--d)", "shared": "var(--e)", "constant": "var(--c)", "affine": "var(--idle)"
}  # fmt: skip


@dataclass(frozen=True)
class ExpertBar:
    """One expert: `chosen` is the opacity of its strip, None without calibration."""

    x: float
    height: float
    colour: str
    outputs: int
    protected: bool
    chosen: float | None
    text: str


@dataclass(frozen=True)
class LayerBars:
    """The experts of one layer; `y` is the line that they stand on."""

    name: str
    y: int
    bars: tuple[ExpertBar, ...]


@dataclass(frozen=True)
class ExpertPicture:
    """All layers with experts; `kinds` are (kind, colour) of what there is. Lengths are in pixels."""

    rows: tuple[LayerBars, ...]
    kinds: tuple[tuple[str, str], ...]
    bar_width: float
    height: int


def expert_picture(layers: Sequence[LayerFacts]) -> ExpertPicture | None:
    """The drawing of the experts; None where no layer has any."""
    found = [(layer, expert_rows(layer)) for layer in layers if layer.classes]
    if not found:
        return None
    experts = [row for _, rows in found for row in rows]
    widest = max(1, *[row.width for row in experts])
    step = min(_WIDEST_BAR + 2, (_RIGHT - _LEFT) / max(len(rows) for _, rows in found))
    most = max([row.chosen or 0.0 for row in experts]) or 1.0
    drawn = []
    for number, (layer, rows) in enumerate(found):
        bars = tuple(_bar(row, round(_LEFT + at * step, 2), widest, most) for at, row in enumerate(rows))
        drawn.append(LayerBars(layer.name, number * _ROW_HEIGHT + 38, bars))
    kinds = dict.fromkeys((row.body, kind_colour(row.body)) for row in experts)
    return ExpertPicture(tuple(drawn), tuple(kinds), round(step * 0.88, 2), len(found) * _ROW_HEIGHT + 4)


def _bar(row: ExpertRow, x: float, widest: int, most: float) -> ExpertBar:
    height = max(_LEAST_HEIGHT, _BAR_HEIGHT * row.width / widest)
    chosen = None if row.chosen is None else round(0.06 + 0.94 * row.chosen / most, 3)
    return ExpertBar(x, round(height, 1), kind_colour(row.body), len(row.outputs), row.protected, chosen, _text(row))


def _text(row: ExpertRow) -> str:
    words = [f"expert {row.number}", row.body]
    words += [f"width {row.width:,}"] * bool(row.width) + [f"rank {row.rank:,}"] * bool(row.rank)
    words.append(f"{row.bytes:,} bytes")
    words.append(f"router outputs {', '.join(map(str, row.outputs))}" if row.outputs else "no router output")
    if row.chosen is not None and row.gate_mass is not None:
        words.append(f"chosen by {row.chosen:.1%} of the tokens, {row.gate_mass:.1%} of the gates")
    return ", ".join([*words, *["protected"] * row.protected])


def kind_colour(kind: str) -> str:
    """The colour of a kind of experts, as the page's style names it."""
    return next((colour for word, colour in _COLOURS.items() if word in kind), "var(--a)")
