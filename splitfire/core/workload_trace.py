"""What arrives, and when: a trace is requests in order of time, their blocks named by 64 bits. Pure.

Mooncake's format (Qin et al., Mooncake, FAST 2025): one JSON object a line, `timestamp` in milliseconds, `input_length`, `output_length`,
and `hash_ids`, one for each block of 512 tokens: equal ids are equal prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitfire.core.errors import ConfigError

MOONCAKE_BLOCK = 512
MAX_LINE_BYTES = 1 << 20
MAX_ARRIVALS = 2_000_000
MAX_TOKENS = 10_000_000  # of one request
MAX_TIME_MS = 10 * 366 * 86_400_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `names` are those of the prompt's full blocks."""

    at_s: float
    num_tokens: int
    num_output: int
    names: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals by time, the first at 0 or later."""

    name: str
    block_size: int
    arrivals: Sequence[Arrival]

    @property
    def num_blocks(self) -> int:
        """Different ones, of prompts: the working set."""
        return len({name for arrival in self.arrivals for name in arrival.names})

    def at_rate(self, factor: float) -> Trace:
        """The same, so many times as fast."""
        return replace(self, arrivals=[replace(arrival, at_s=arrival.at_s / factor) for arrival in self.arrivals])


def read_mooncake(path: Path) -> Trace:
    """ConfigError, with the line's number, when it is not such a file."""
    try:
        with path.open("rb") as lines:
            return parse_mooncake(path.name, lines)
    except OSError as exc:
        raise ConfigError(f"{path.name}: {exc.strerror or exc}; expected a trace in Mooncake's JSONL format") from exc


def parse_mooncake(name: str, lines: Iterable[bytes]) -> Trace:
    """In any order of time; blank lines are skipped."""
    arrivals: list[Arrival] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(arrivals) == MAX_ARRIVALS:
            raise ConfigError(f"{name}, line {number}: more than {MAX_ARRIVALS} requests")
        try:
            arrivals.append(_arrival(line))
        except (ValueError, RecursionError) as exc:
            raise ConfigError(f"{name}, line {number}: {str(exc).splitlines()[0]}") from exc
    if not arrivals:
        raise ConfigError(f"{name}: no request in it")
    return Trace(name, MOONCAKE_BLOCK, sorted(arrivals, key=lambda arrival: arrival.at_s))


def _arrival(line: bytes) -> Arrival:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"{len(line)} bytes, at most {MAX_LINE_BYTES}")
    entry = json.loads(line.decode())
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, not {type(entry).__name__}")
    at_ms = _number(entry, "timestamp", 0, MAX_TIME_MS)
    num_tokens = int(_number(entry, "input_length", 1, MAX_TOKENS))
    num_output = int(_number(entry, "output_length", 0, MAX_TOKENS))
    names = entry.get("hash_ids")
    if not isinstance(names, list) or not all(type(name) is int and 0 <= name < 1 << 64 for name in names):
        raise ValueError("hash_ids: expected a list of numbers from 0 to 2**64 - 1")
    num_full = num_tokens // MOONCAKE_BLOCK
    if not num_full <= len(names) <= num_full + 1:
        raise ValueError(f"hash_ids: {len(names)} for {num_tokens} tokens, expected one for each {MOONCAKE_BLOCK}")
    return Arrival(at_ms / 1e3, num_tokens, max(1, num_output), tuple(names[:num_full]))


def _number(entry: dict[object, object], field: str, least: int, most: int) -> float:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN fails this too
        raise ValueError(f"{field}: {json.dumps(value)[:40]}, expected a number from {least} to {most}")
    return value
