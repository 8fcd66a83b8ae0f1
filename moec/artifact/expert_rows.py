"""The stored experts of a layer one by one, as tables and drawings show them."""

from __future__ import annotations

from dataclasses import dataclass

from moec.artifact.report import LayerFacts


@dataclass(frozen=True)
class ExpertRow:
    """One stored expert of one layer.

    `outputs` are the router outputs that name it, several for one with aliases. `chosen` is the share of the calibrated
    tokens that chose it, `gate_mass` its share of the sum of all gates; None without calibration. `bytes` are its own,
    without what its class shares.
    """

    number: int
    body: str
    width: int
    rank: int
    bytes: int
    outputs: tuple[int, ...]
    protected: bool
    chosen: float | None
    gate_mass: float | None


def expert_rows(layer: LayerFacts) -> tuple[ExpertRow, ...]:
    """The experts of a layer by number."""
    rows = []
    use = layer.use
    mass = sum(use.gate_mass) if use is not None else 0.0
    for group in layer.classes:
        for number in group.experts:
            known = use is not None and number < len(use.chosen)
            rows.append(
                ExpertRow(
                    number=number,
                    body=group.body,
                    width=group.width,
                    rank=group.rank,
                    bytes=group.bytes_per_expert,
                    outputs=tuple(output for output, expert in enumerate(layer.stored) if expert == number),
                    protected=number in layer.protected,
                    chosen=use.chosen[number] / max(use.tokens, 1) if use is not None and known else None,
                    gate_mass=use.gate_mass[number] / (mass or 1.0) if use is not None and known else None,
                )
            )
    return tuple(sorted(rows, key=lambda row: row.number))


def describe_experts(layer: LayerFacts) -> str:
    """How many experts of each kind there are, such as `6 SwiGLU + 2 constant, 1 output to none`."""
    counts: dict[str, int] = {}
    for group in layer.classes:
        counts[group.body] = counts.get(group.body, 0) + len(group.experts)
    text = " + ".join(f"{count} {body}" for body, count in counts.items())
    empty = layer.stored.count(-1)
    aliases = len(layer.stored) - empty - len(set(layer.stored) - {-1})
    notes = [f"{aliases} alias{'es' * (aliases > 1)}"] * bool(aliases)
    notes += [f"{empty} output{'s' * (empty > 1)} to none"] * bool(empty)
    return ", ".join([text, *notes])


def describe_widths(layer: LayerFacts) -> str:
    """The hidden widths of a layer's experts: one number, or the least and the largest; empty where none has any."""
    found = sorted({group.width for group in layer.classes if group.width})
    if len(found) > 1:
        return f"{found[0]}–{found[-1]}"
    return str(found[0]) if found else ""
