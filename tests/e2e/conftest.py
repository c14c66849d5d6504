"""Real fleets of real processes, over real sockets and real UCX; one with pico is shared by every test that does it no harm."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.e2e.fleets import RunningFleet, start_fleet


@pytest.fixture(scope="session", autouse=True)
def sigint_as_at_a_terminal() -> None:
    """A shell that starts something in the background makes it ignore SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def pico() -> Iterator[RunningFleet]:
    """One prefill and one decode worker, always split. Every test leaves it as it found it."""
    with start_fleet("pico") as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that used the shared fleet: no block, slot or request is held any more."""
    yield
    if "pico" in request.fixturenames:
        fleet: RunningFleet = request.getfixturevalue("pico")
        fleet.assert_no_leaks()
