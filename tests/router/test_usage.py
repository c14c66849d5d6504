"""The usage log: a line a request, in one chain whoever writes, through full disks (F29) and renamed files."""

from __future__ import annotations

import errno
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.ended import Ended
from router.usage import UsageLog
from splitfire.core.errors import ConfigError
from splitfire.core.usage import BEGINNING, CONTINUED, Price, read_lines
from splitfire.v1 import inference_pb2 as pb


def ended(number: int, tenant: str = "a") -> Ended:
    usage = pb.Usage(prompt_tokens=10, cached_prompt_tokens=4, generated_tokens=number)
    return Ended(tenant, "0123456789ab", "pico", "ok", 0.0, 1.0, pb.Summary(request_id=f"r{number}", usage=usage), 0.25, 0.5)


def lines_of(path: Path, previous: str = BEGINNING) -> Iterator[Any]:
    with path.open() as file:
        yield from read_lines(file, str(path), previous=previous)


def test_each_request_is_a_line_and_a_restart_goes_on_with_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    for start in (0, 5):
        log = UsageLog(path, {"*": Price(generated=1.0)})
        for number in range(start, start + 5):
            log.add(ended(number))
        log.close()
    found = list(lines_of(path))
    assert [one.line.request_id for one in found] == [f"r{n}" for n in range(10)]
    line = found[7].line
    assert (line.tenant, line.key, line.model, line.outcome) == ("a", "0123456789ab", "pico", "ok")
    assert (line.prompt_tokens, line.cached_tokens, line.generated_tokens) == (10, 4, 7)
    assert (line.prefill_s, line.decode_s, str(found[7].cost)) == (0.25, 0.5, "0.000007000")


def test_a_full_file_is_renamed_and_the_chain_goes_on_in_the_next(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    for number in range(6):
        log = UsageLog(path, {}, max_bytes=700)
        log.add(ended(number))
        log.close()
    files = [*sorted(p for p in tmp_path.iterdir() if p != path), path]
    assert len(files) >= 3
    previous, ids = BEGINNING, []
    for file in files:
        found = list(lines_of(file, previous))
        ids += [one.line.request_id for one in found if one.line.outcome != CONTINUED]
        previous = found[-1].hash
    assert ids == [f"r{n}" for n in range(6)]


def test_two_processes_share_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    logs = [UsageLog(path, {}, max_bytes=2000), UsageLog(path, {}, max_bytes=2000)]
    for log in logs:
        log.close()
    for number in range(20):
        logs[number % 2].add(ended(number))
        logs[number % 2]._flush()
    files = [*sorted(p for p in tmp_path.iterdir() if p != path), path]
    previous, ids = BEGINNING, []
    for file in files:
        found = list(lines_of(file, previous))
        ids += [one.line.request_id for one in found if one.line.outcome != CONTINUED]
        previous = found[-1].hash
    assert ids == [f"r{n}" for n in range(20)]


def test_a_full_disk_loses_nothing_and_a_line_cut_off_is_taken_away(tmp_path: Path) -> None:
    """F29. The kernel takes the first bytes and refuses the rest, as a disk does that is full."""
    path = tmp_path / "usage.jsonl"
    log = UsageLog(path, {})
    log.close()
    log.add(ended(1))
    log._flush()
    with path.open("a") as file:
        file.write('{"at": "2026')  # what a kill in the middle of a write leaves
    log.add(ended(2))
    log.add(ended(3))
    size = path.stat().st_size
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))  # room for a line and a half
    try:
        for _ in range(3):
            log._flush()
            assert [json.loads(row)["request_id"] for row in path.read_text().splitlines()] == ["r1"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    log.add(ended(4))
    log._flush()
    assert [one.line.request_id for one in lines_of(path)] == ["r1", "r2", "r3", "r4"]
    assert log.num_dropped == 0


def test_where_no_other_file_can_be_begun_this_one_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one file that is mounted alone. Nothing is written twice, and nothing is left beside it."""
    path = tmp_path / "usage.jsonl"
    log = UsageLog(path, {}, max_bytes=300)
    log.close()

    def busy(_self: Path, _target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    for number in range(4):
        log.add(ended(number))
        log._flush()
        log._flush()
    assert [one.line.request_id for one in lines_of(path)] == [f"r{n}" for n in range(4)]
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes\n")
    with pytest.raises(ConfigError, match="holds something else than usage"):
        UsageLog(path, {})
    assert path.read_text() == "these are notes\n"
