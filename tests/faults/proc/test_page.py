"""docs/faults.md is what the tests say, and says of every row where it is tried or why it is not."""

from __future__ import annotations

from tests.checkpoints import ROOT
from tests.faults.matrix import FAULTS, NOT_YET, names_by_row, page


def test_the_page_of_faults_is_printed_from_the_tests() -> None:
    assert (ROOT / "docs" / "faults.md").read_text() == page(), "run: make docs"


def test_no_test_names_a_row_that_is_none() -> None:
    assert not set(names_by_row()) - set(FAULTS)


def test_a_row_without_a_test_says_why_and_one_with_a_test_is_not_called_missing() -> None:
    found = set(names_by_row())
    assert not found & set(NOT_YET)
    assert not set(FAULTS) - found - set(NOT_YET)
