"""Real processes: `test_core.py` runs with all tests, `long/` with `make test-faults`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.proc.sick_fleet import Ground, sick_fleet

collect_ignore = ["long"]


@pytest.fixture(autouse=True)
def in_place() -> None:
    """How payloads go is for real workers to choose."""


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    """Three prefill and two decode workers that can be taken ill."""
    with sick_fleet(prefill=3, decode=2) as ground:
        yield ground


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that used the shared fleet: nobody holds a block, a slot or a request. Who ended starts again beside the next
    tests; one that needs everybody says so."""
    yield
    if "ground" in request.fixturenames:
        ground: Ground = request.getfixturevalue("ground")
        ground.restart()
        ground.fleet.assert_no_leaks(20.0)  # P5, of a peer that died
