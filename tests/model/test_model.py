"""The searches that are short enough for every change; `make model-check` runs them all (docs/handoff.md has its table)."""

from __future__ import annotations

import re

import pytest

from tests.checkpoints import ROOT
from tests.model.explore import SCENARIOS, explore

SHORT = ("one", "repeated", "lossy", "deadline", "two short of blocks")


@pytest.mark.parametrize("name", SHORT)
def test_no_order_of_events_breaks_a_promise(name: str) -> None:
    """P1-P5, P7 and P10 in every world that can be reached; test_hold_expiry_race (F43) is `deadline`."""
    found = explore(SCENARIOS[name])
    assert found.num_quiet > 0


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in SHORT])
def test_the_long_searches_begin_well(name: str) -> None:
    explore(SCENARIOS[name], max_worlds=400)


def test_the_table_in_docs_names_every_search() -> None:
    page = (ROOT / "docs" / "handoff.md").read_text()
    assert re.findall(r"^\| `([a-z ]+)` \| \d", page, re.MULTILINE) == list(SCENARIOS)
