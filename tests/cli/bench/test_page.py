"""The report: well-formed, needs nothing from elsewhere, and nobody's name becomes markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from splitfire.cli.bench.markup import Markup, tag
from splitfire.cli.bench.page import page
from splitfire.cli.bench.plot import Scale, linear_ticks, log_ticks
from splitfire.cli.bench.results import Results, as_json
from splitfire.cli.bench.statistics import Cell
from tests.cli.bench.samples import cell, failed, outcome, results, sweep

EVIL = "</title><script>alert('x')</script>&\"<img src=x onerror=y>"


def tree(text: str) -> ElementTree.Element:
    """Every tag that is opened is closed, every attribute quoted: XML is stricter than browsers are."""
    return ElementTree.fromstring(text.removeprefix("<!doctype html>"))


class Tags(HTMLParser):
    """As a browser reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


def cases() -> dict[str, list[Cell]]:
    return {
        "both": sweep(),
        "one rate": [cell([outcome()] * 5)],
        "no gaps": [cell([outcome(num_gaps=0)] * 5)],
        "nothing answered": [cell([failed("unavailable")] * 5), cell([failed("unavailable")] * 5, rate=4.0)],
        "nothing in time": [cell([outcome(9.0)] * 5)],
        "three": [cell([outcome()] * 5, name) for name in ("split", "aggregated", "auto")],
        "times of nothing": [cell([outcome(0.0, 0.0)] * 5)],
        "nothing": [],
    }


@pytest.mark.parametrize("name", cases())
def test_it_is_well_formed_whatever_was_measured(name: str) -> None:
    text = page(results(cases()[name]))
    html = tree(text)
    assert html.tag == "html"
    assert "nan" not in re.findall(r'="([^"]*)"', text)
    assert len(text) < 200_000


@pytest.mark.parametrize("name", cases())
def test_it_needs_nothing_from_elsewhere(name: str) -> None:
    text = page(results(cases()[name]))
    for word in ("http:", "https:", "//", "url(", "@import", "src=", "href=", "<script", "<link", "<iframe", "<object"):
        assert word not in text, word
    [policy] = [meta.get("content") for meta in tree(text).iter("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_and_reasons_are_never_markup() -> None:
    evil = results(
        [cell([outcome(), failed(EVIL)], variant=EVIL)],
        model=EVIL,
        head={EVIL: EVIL},
        notes=[EVIL],
        warnings=[EVIL],
        comparison=EVIL,
    )
    text = page(evil)
    tags = Tags()
    tags.feed(text)
    assert not {"script", "img"} & set(tags.names)
    assert not {"onerror", "src"} & set(tags.attributes)
    assert EVIL in "".join(tree(text).itertext())


def pictures(found: Results) -> dict[str, ElementTree.Element]:
    """By title."""
    return {svg.findtext("title", ""): svg for svg in tree(page(found)).iter("svg") if svg.find("title") is not None}


def test_every_rate_has_its_distributions_and_every_chart_its_lines() -> None:
    found = pictures(results(sweep()))
    assert "Goodput against request rate" in found
    for rate in ("1 request/s", *(f"{rate} requests/s" for rate in (2, 4, 8, 16, 32))):
        for name in ("time to first token", "time between tokens"):
            drawn = found[f"{name} at {rate}"]
            assert len([line for line in drawn.iter("polyline") if "line c" in line.get("class", "")]) == 2
            tips = [tip.text for tip in drawn.iter("title") if "p99" in (tip.text or "")]
            assert len(tips) == 6, "p50, p90 and p99 of both"
    goodput = ["".join(text.itertext()) for text in found["Goodput against request rate"].iter("text")]
    assert {"ideal: all in time", "90% in time"} <= set(goodput)
    targets = ["".join(text.itertext()) for text in found["time to first token against request rate"].iter("text")]
    assert "target 500 ms" in targets


def test_phases_are_drawn_where_they_are_told() -> None:
    told = pictures(results(sweep()))["Phases of the time to the first token, means"]
    assert len(list(told.iter("rect"))) == 6 * (5 + 2)
    untold = [replace(cell, outcomes=[replace(outcome, phases=()) for outcome in cell.outcomes]) for cell in sweep()]
    assert "Phases of the time to the first token, means" not in pictures(results(untold))


def test_numbers_and_failures_are_in_the_table() -> None:
    text = page(results([cell([outcome(0.1234)] * 9 + [failed("queue_full")], rate=4.0)]))
    rows = ["|".join("".join(td.itertext()) for td in tr) for tr in tree(text).iter("tr")]
    assert any(row.startswith("4|split|10|1|90%|3.60|123|123|123|10.0|") for row in rows), rows
    assert "1 queue_full" in text


def test_json_has_rows_and_requests() -> None:
    cells = [cell([outcome(0.1234), failed("queue_full")], rate=4.0)]
    read = json.loads(json.dumps(as_json(results(cells), cells), allow_nan=False))
    assert read["rows"][0]["ttft"]["p50"] == 0.1234
    assert read["rows"][0]["share_met"] == 0.5
    assert [request["error"] for request in read["runs"][0]["requests"]] == ["", "queue_full"]
    assert read["runs"][0]["requests"][1]["ttft_s"] is None
    assert len(read["quantiles"]) == len(read["rows"][0]["itl"]["curve"])


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>", tag("i", "&"), class_='a"b') == '<p class="a&quot;b">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(tag("p"), Markup)
    assert tag("circle", r=1.25, stroke_width=None) == '<circle r="1.2"/>'


def test_ticks_are_round_and_few() -> None:
    assert linear_ticks(0, 33) == [0, 10, 20, 30]
    assert linear_ticks(0, 1.1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(0.04, 1.2) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0])
    assert len(log_ticks(1e-4, 1e3)) <= 8
    for low, high in ((0.9, 1.1), (0.5, 0.6), (1e-4, 1e4)):
        assert len(log_ticks(low, high)) <= 9


def test_what_lies_outside_of_a_scale_is_drawn_at_its_edge() -> None:
    scale = Scale(1.0, 100.0, 0.0, 200.0, is_log=True)
    assert [scale(value) for value in (0.0, 1.0, 10.0, 100.0, 1e6)] == pytest.approx([0, 0, 100, 200, 200])
