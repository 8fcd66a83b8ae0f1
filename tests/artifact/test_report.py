"""The report is one page that needs nothing from elsewhere and says what report.json says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moec.artifact.report import format_number, format_size, layer_runs, read_report, render_report, write_report
from tests.artifact.samples import sample_report


class Balance(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        # In HTML these have no end tag; in the drawings `<line>` has one.
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def test_page_is_well_formed_and_self_contained() -> None:
    page = render_report(sample_report())
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert not re.search(r"<script|<link|<img|https?://|@import|url\(", page)


def test_every_expert_is_drawn_once() -> None:
    page = render_report(sample_report())
    assert len(re.findall(r"<title>layers\.1, expert \d", page)) == 8
    assert sorted(re.findall(r"<title>layers\.2, expert (\d)", page)) == list("01234")
    assert "84 % of the bound" in page
    assert "was 3,085,440" in page


def test_sections_without_measurements_are_left_out() -> None:
    page = render_report(sample_report().model_copy(update={"losses": (), "speeds": (), "verification": ()}))
    assert "<h2>Losses" not in page
    assert "<h2>Speed" not in page
    assert "Not verified" in page


def test_names_from_a_model_cannot_inject_markup() -> None:
    page = render_report(sample_report().model_copy(update={"title": "<script>alert(1)</script>{{ 7 * 7 }}"}))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page


def test_json_holds_the_same_facts(tmp_path: Path) -> None:
    write_report(tmp_path, sample_report())
    assert read_report(tmp_path) == sample_report()


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")])
def test_sizes(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("number", "text"), [(1234567, "1,234,567"), (3.1e-6, "3.10e-06"), (0.0, "0"), (2.5, "2.5")])
def test_numbers(number: float, text: str) -> None:
    assert format_number(number) == text


def test_equal_neighbours_are_one_row() -> None:
    dense, mixture, *_ = sample_report().layers
    layers = [mixture.model_copy(update={"name": f"model.layers.{index}"}) for index in range(3)]
    runs = layer_runs([dense, *layers, dense])
    assert [name for name, _ in runs] == ["layers.0", "model.layers.0 … 2", "layers.0"]
    assert runs[1][1].classes == mixture.classes
