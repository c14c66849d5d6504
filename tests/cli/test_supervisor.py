"""Which processors a fleet's workers get."""

from __future__ import annotations

import os

import pytest

from splitfire.cli.supervisor import default_cpus, share


@pytest.mark.parametrize(
    ("cpus", "count", "shares"),
    [
        ((0, 1, 2, 3), 2, [(0, 1), (2, 3)]),
        ((0, 1, 2), 2, [(0,), (1,)]),
        ((5,), 2, [(5,), (5,)]),  # too few: shared by all
        ((), 2, [(), ()]),
        ((0, 1), 0, []),
    ],
)
def test_processors_are_shared_in_equal_runs(cpus: tuple[int, ...], count: int, shares: list[tuple[int, ...]]) -> None:
    assert share(cpus, count) == shares


@pytest.mark.parametrize(
    ("present", "workers", "expected"),
    [
        ({0, 1}, (1, 1), ((0,), (1,))),
        (set(range(8)), (1, 3), ((0, 1), (2, 3, 4, 5, 6, 7))),
        ({0}, (1, 1), ((), ())),  # everybody everywhere
        ({0, 1}, (0, 1), ((), (0, 1))),
    ],
)
def test_the_roles_divide_what_there_is(
    monkeypatch: pytest.MonkeyPatch, present: set[int], workers: tuple[int, int], expected: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: present)
    assert default_cpus(*workers) == expected
