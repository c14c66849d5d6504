"""Files that tell Prometheus of metrics ports: there while their processes are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitfire.core.errors import ConfigError
from splitfire.core.scrape_target import ScrapeTarget
from tests.checkpoints import ROOT

KILLED = """
import os, signal, sys
from pathlib import Path
from splitfire.core.scrape_target import ScrapeTarget
target = ScrapeTarget(Path(sys.argv[1]), "127.0.0.1", 1, {"worker": "decode-0"})
os.kill(os.getpid(), signal.SIGKILL)
"""


def read(directory: Path) -> list[Any]:
    """What Prometheus would."""
    return [entry for path in sorted(directory.glob("*.json")) for entry in json.loads(path.read_text())]


def test_a_target_is_there_until_it_is_removed(tmp_path: Path) -> None:
    target = ScrapeTarget(tmp_path, "127.0.0.1", 4711, {"worker": "decode-0"})
    other = ScrapeTarget(tmp_path, "::1", 4712, {"worker": "decode-1"})
    found = sorted(read(tmp_path), key=str)
    assert found == [
        {"targets": ["127.0.0.1:4711"], "labels": {"worker": "decode-0"}},
        {"targets": ["[::1]:4712"], "labels": {"worker": "decode-1"}},
    ]
    target.remove()
    assert [entry["labels"]["worker"] for entry in read(tmp_path)] == ["decode-1"]
    other.remove()
    assert not list(tmp_path.iterdir())


def test_who_was_killed_is_missed_until_another_comes(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False, timeout=30)
    assert ran.returncode == -9
    assert [entry["labels"]["worker"] for entry in read(tmp_path)] == ["decode-0"], "so that it is seen to be gone"
    target = ScrapeTarget(tmp_path, "127.0.0.1", 2, {"worker": "decode-1"})
    assert [entry["labels"]["worker"] for entry in read(tmp_path)] == ["decode-1"]
    target.remove()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics_targets .*nowhere: No such file or directory"):
        ScrapeTarget(tmp_path / "nowhere", "127.0.0.1", 1, {})
