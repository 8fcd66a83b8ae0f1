"""Codes are made only for offers that could be chosen: estimates tell which, and what is chosen is priced really.

A plan is solved with the estimates, what it chose is coded and priced, and so on until all of it is. Then nothing but
prices of codes that were made decides. How far the estimates of an expert were off corrects those of its other codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moec.budget.actions import Offer
from moec.budget.offers import TableSettings
from moec.budget.tables import ExpertTable, LayerTable, priced_offers
from moec.calibration.calibration import Calibration
from moec.experts import MoeLayer

_LEAST, _MOST = 0.1, 10.0
"""Estimates of an expert are corrected by factors within these."""


@dataclass
class Pricing:
    """The `tables` of `layers`. `codings` counts experts coded so far, each time for one offer."""

    layers: Sequence[MoeLayer]
    calibration: Calibration
    settings: TableSettings
    tables: list[LayerTable]
    codings: int = 0
    _estimates: list[LayerTable] = field(init=False, repr=False)
    _known: dict[tuple[int, int], dict[int, Offer]] = field(default_factory=dict, repr=False)
    """For an expert of a layer the offers that were priced, by their numbers."""

    def __post_init__(self) -> None:
        self._estimates = list(self.tables)

    @property
    def has_estimates(self) -> bool:
        """Whether any price is one."""
        return any(offer.sure is not None for layer in self.tables for table in layer.experts for offer in table.offers)

    def price(self, choices: Sequence[int], *, neighbours: bool) -> bool:
        """Prices the chosen offers, one for each expert, by coding them; whether any was an estimate.

        With `neighbours` also the next smaller and the next larger offer that some price of bytes could choose.
        """
        changed = False
        numbers = iter(choices)
        for position, layer in enumerate(self.tables):
            wanted: dict[int, list[int]] = {}
            for table in layer.experts:
                choice = next(numbers)
                found = [choice, *(_beside(table.offers, choice) if neighbours else ())]
                estimated = [number for number in found if table.offers[number].sure is not None]
                changed |= choice in estimated
                if estimated:
                    wanted[table.expert] = sorted(estimated)
            if layer.base_bytes:
                next(numbers)
            if wanted:
                self._price(position, wanted)
        return changed

    def known(self) -> list[LayerTable]:
        """Tables without estimates."""
        return [
            replace(
                layer,
                experts=tuple(
                    replace(table, offers=tuple(offer for offer in table.offers if offer.sure is None))
                    for table in layer.experts
                ),
            )
            for layer in self.tables
        ]

    def _price(self, position: int, wanted: dict[int, list[int]]) -> None:
        layer = self.tables[position]
        offers = {
            expert: [layer.experts[expert].offers[number] for number in found] for expert, found in wanted.items()
        }
        priced = priced_offers(self.layers[position], self.calibration, self.settings, offers)
        experts = list(layer.experts)
        for expert, numbers in wanted.items():
            self.codings += len(numbers)
            known = self._known.setdefault((position, expert), {})
            known.update(zip(numbers, priced[expert], strict=True))
            experts[expert] = _corrected(self._estimates[position].experts[expert], known)
        self.tables[position] = replace(layer, experts=tuple(experts))


def _corrected(table: ExpertTable, known: dict[int, Offer]) -> ExpertTable:
    """Estimates times what those that are `known` were off by, of what codes add."""
    guessed = real = 0.0
    for number, offer in known.items():
        estimate = table.offers[number]
        assert estimate.sure is not None
        guessed += estimate.distortion - estimate.sure
        real += offer.distortion - estimate.sure
    factor = min(max(real / guessed, _LEAST), _MOST) if guessed > 0 else 1.0
    offers = []
    for number, offer in enumerate(table.offers):
        if number in known:
            offer = known[number]
        elif offer.sure is not None:
            offer = replace(offer, distortion=offer.sure + factor * (offer.distortion - offer.sure))
        offers.append(offer)
    return replace(table, offers=tuple(offers))


def _beside(offers: Sequence[Offer], choice: int) -> list[int]:
    """The next numbers on both sides of a choice on the lower convex hull of bytes and distortion."""
    hull: list[int] = []
    for number in sorted(range(len(offers)), key=lambda number: (offers[number].bytes, offers[number].distortion)):
        if hull and offers[number].bytes == offers[hull[-1]].bytes:
            continue
        while len(hull) > 1 and not _turns(offers[hull[-2]], offers[hull[-1]], offers[number]):
            hull.pop()
        hull.append(number)
    smaller = [number for number in hull if offers[number].bytes < offers[choice].bytes]
    larger = [number for number in hull if offers[number].bytes > offers[choice].bytes]
    return smaller[-1:] + larger[:1]


def _turns(first: Offer, second: Offer, third: Offer) -> bool:
    """Whether the second lies below the line from the first to the third."""
    before = (second.distortion - first.distortion) * (third.bytes - first.bytes)
    return before < (third.distortion - first.distortion) * (second.bytes - first.bytes)
