"""Shares of busy time, beside the same counted instant by instant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.simulation.overlap import Spans, shares

spans = st.lists(st.integers(0, 60), max_size=8, unique=True).map(sorted).map(lambda at: list(zip(at[::2], at[1::2], strict=False)))


def test_who_is_never_busy_at_once_sees_nobody() -> None:
    assert shares([[(0.0, 1.0)]], [[(1.0, 2.0)]]) == (0.0, 0.0)
    assert shares([[]], [[(1.0, 2.0)]]) == (0.0, 0.0)


def test_each_share_is_of_ones_own_time() -> None:
    assert shares([[(0.0, 4.0)]], [[(3.0, 5.0)]]) == (0.25, 0.5)
    assert shares([[(0.0, 4.0)]], [[(3.0, 5.0)], []]) == (0.125, 0.5), "of two others one never decodes"


@given(st.lists(spans, min_size=1, max_size=3), st.lists(spans, min_size=1, max_size=3))
def test_it_is_what_counting_gives(prefills: list[Spans], decodes: list[Spans]) -> None:
    """A second at a time."""

    def busy(worker: Spans, at: int) -> bool:
        return any(begin <= at < end for begin, end in worker)

    both = sum(busy(p, at) and busy(d, at) for p in prefills for d in decodes for at in range(60))
    mine, theirs = (sum(busy(w, at) for w in workers for at in range(60)) for workers in (prefills, decodes))
    expected = (both / (mine * len(decodes)) if mine else 0.0, both / (theirs * len(prefills)) if theirs else 0.0)
    assert shares(prefills, decodes) == pytest.approx(expected)
