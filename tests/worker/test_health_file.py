"""The file that probes look at: there and fresh exactly while the worker is well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitfire.core.errors import ConfigError
from splitfire.worker.health import BEAT_S, HealthFile


class Clock:
    """Jumps instead of sleeping."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_is_there_while_the_worker_serves(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "healthy"
    file = HealthFile(path, clock)
    assert not path.exists()
    for is_serving in (False, True, True, False, False, True):
        file.set_serving(is_serving)
        assert path.exists() is is_serving


def test_it_is_touched_at_every_beat(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "healthy"
    file = HealthFile(path, clock)
    file.set_serving(True)
    os.utime(path, (0, 0))
    clock.now += BEAT_S / 2
    file.set_serving(True)
    assert path.stat().st_mtime == 0, "not at every look"
    clock.now += BEAT_S / 2
    file.set_serving(True)
    assert path.stat().st_mtime > 0


def test_a_place_that_is_lost_later_stops_nothing(tmp_path: Path, clock: Clock) -> None:
    place = tmp_path / "place"
    place.mkdir()
    file = HealthFile(place / "healthy", clock)
    place.rmdir()
    file.set_serving(True)
    file.set_serving(False)
    place.mkdir()
    file.set_serving(True)
    assert (place / "healthy").exists()


def test_a_place_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"health_file .*nowhere/healthy: No such file or directory"):
        HealthFile(tmp_path / "nowhere" / "healthy")
