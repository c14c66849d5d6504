"""What the flags of `splitfire bench serve` may say. Pure: text in, values out, or ConfigError that names flag, value and what is accepted."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from splitfire.core.errors import ConfigError

AUTO = "auto"
UNITS_S = {"ms": 1e-3, "s": 1.0, "min": 60.0}
MIN_RATE, MAX_RATE = 0.01, 10_000.0
MAX_RATES = 64
MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, drawn evenly from `least` to `most`, both included."""

    least: int
    most: int

    def draw(self, random: Random) -> int:
        return random.randint(self.least, self.most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, slots=True)
class Slo:
    """A request is in time when its first token came within `ttft_s` and its gaps are `itl_s` or less in the mean."""

    ttft_s: float
    itl_s: float


def refuse(flag: str, value: object, accepted: str) -> ConfigError:
    return ConfigError(f"{flag}: is {value!r}, accepted: {accepted}")


def parse_time(flag: str, text: str, least_s: float, most_s: float) -> float:
    """Seconds of `500ms`, `30s` or `2min`. A bare number is refused: of 500 nobody knows what was meant."""
    accepted = f"a time such as 500ms, 30s or 2min, from {_time(least_s)} to {_time(most_s)}"
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|min)", text.strip())
    if match is None or not least_s <= (seconds := float(match[1]) * UNITS_S[match[2]]) <= most_s:
        raise refuse(flag, text, accepted)
    return seconds


def parse_rates(flag: str, text: str) -> tuple[float, ...]:
    """Rising, each once; empty for `auto`."""
    if text.strip() == AUTO:
        return ()
    accepted = (
        f"{AUTO}, or at most {MAX_RATES} requests a second with commas, such as 1,2,4,8, each from {MIN_RATE:g} to {MAX_RATE:g}"
    )
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > MAX_RATES or not all(re.fullmatch(r"\d{1,9}(\.\d{1,9})?", part) for part in parts):
        raise refuse(flag, text, accepted)
    rates = sorted({float(part) for part in parts})
    if not MIN_RATE <= rates[0] <= rates[-1] <= MAX_RATE:
        raise refuse(flag, text, accepted)
    return tuple(rates)


def parse_lengths(flag: str, text: str) -> Lengths:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    if match is None or not 1 <= (least := int(match[1])) <= (most := int(match[2] or match[1])) <= MAX_TOKENS:
        raise refuse(flag, text, f"a number of tokens such as 256, or two such as 64-512, from 1 to {MAX_TOKENS}")
    return Lengths(least, most)


def parse_count(flag: str, text: str, least: int, most: int) -> int:
    if re.fullmatch(r"\d{1,18}", text.strip()) is None or not least <= (count := int(text)) <= most:
        raise refuse(flag, text, f"a number from {least} to {most}")
    return count


def parse_names(flag: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """Some of `known`, each once, in the order given."""
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise refuse(flag, text, f"one or more of {', '.join(known)}, with commas, each once")
    return names


def parse_server(flag: str, text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or any(c.isspace() for c in text) or re.fullmatch(r"\d{1,5}", port) is None or not 0 < int(port) < 65536:
        raise refuse(flag, text, "host:port of a router, such as 127.0.0.1:7070")
    return text


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:g}ms" if seconds < 1 else f"{seconds:g}s"
