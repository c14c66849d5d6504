"""What a trace file may hold, and what is said of one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitfire.core.errors import ConfigError
from splitfire.core.workload_trace import parse_mooncake, read_mooncake

GOOD = {"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def test_a_trace_is_read_in_order_of_time_with_its_full_blocks() -> None:
    trace = parse_mooncake("t", [line(), b"\n", line(timestamp=0, input_length=1024, hash_ids=[1, 2])])
    assert [arrival.at_s for arrival in trace.arrivals] == [0.0, 1.5]
    assert [arrival.names for arrival in trace.arrivals] == [(1, 2), (1, 2)], "the last block of 1100 tokens is not full"
    assert trace.num_blocks == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"timestamp": 0,', "Expecting property name"),
        (b"[]", "expected an object, not list"),
        (b"\xff\xfe", "utf-8"),
        (line(timestamp=-1), "timestamp: -1, expected a number from 0"),
        (line(timestamp=float("nan")), "timestamp: NaN"),
        (line(input_length=0), "input_length: 0"),
        (line(input_length=True), "input_length: true"),
        (line(output_length="7"), 'output_length: "7"'),
        (line(hash_ids=[1]), "hash_ids: 1 for 1100 tokens"),
        (line(hash_ids=[1, -2, 3]), "hash_ids: expected a list"),
        (line(hash_ids=None), "hash_ids: expected a list"),
        (b"[" * 100_000, ""),
        (b'"' + b"x" * (1 << 20) + b'"', "1048578 bytes, at most 1048576"),
    ],
)
def test_a_bad_line_is_named_by_its_number(bad: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mooncake("some.jsonl", [line(), bad])
    text = str(caught.value)
    assert text.startswith("some.jsonl, line 2: ")
    assert says in text
    assert "\n" not in text


def test_an_empty_or_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no request"):
        parse_mooncake("t", [])
    with pytest.raises(ConfigError, match=r"none\.jsonl: No such file"):
        read_mooncake(tmp_path / "none.jsonl")
