"""Which processors a fleet's workers get, and what is said of one that does not end well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitfire.cli.supervisor import Child, Fleet, FleetPlan, default_cpus, share


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


def ending_with(code: int, directory: Path) -> Child:
    """A child that does when it is asked to end."""
    program = (
        f"import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\nprint('up', flush=True)\nsignal.pause()"
    )
    child = Child(f"ends-with-{code}", [sys.executable, "-c", program], directory / f"{code}.log")
    child.process = subprocess.Popen(child.command, stdout=subprocess.PIPE)
    assert child.process.stdout is not None
    with child.process.stdout as said:
        assert said.readline() == b"up\n"
    return child


@pytest.mark.parametrize(("code", "is_said"), [(0, False), (1, True)])
def test_who_does_not_end_well_is_named_and_its_log_kept(tmp_path: Path, code: int, is_said: bool) -> None:
    said: list[str] = []
    fleet = Fleet(FleetPlan("pico", "pico", 0, 1, (), (), 1), said.append, tmp_path / "logs")
    fleet.directory.mkdir()
    fleet.children += [ending_with(0, fleet.directory), ending_with(code, fleet.directory)]
    fleet.is_ready = True
    fleet.stop()
    assert fleet.directory.exists() == is_said
    assert said == ([f"ends-with-1 did not end as it should; its log is {fleet.directory / '1.log'}"] if is_said else [])
