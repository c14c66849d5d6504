"""The bug gate (`make bug-gate` prints it): what is planted is caught, and the table in docs/handoff.md says by what."""

from __future__ import annotations

import pytest

from tests.checkpoints import ROOT
from tests.model.bugs import BUGS, Bug, is_caught, table


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    assert is_caught(bug)


def test_the_table_in_docs_is_printed_from_the_bugs() -> None:
    assert "\n".join(table()) in (ROOT / "docs" / "handoff.md").read_text()
