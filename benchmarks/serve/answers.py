"""When the tokens of one answer came, and what is read off it. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """Instants of one streamed answer, seconds since it was asked for; one for each token."""

    token_times: tuple[float, ...]
    kv_bytes: int = 0  # moved between workers; ours alone tells
    num_cached: int = 0  # prompt tokens found in a prefix cache; ours alone tells

    @property
    def ttft_s(self) -> float:
        return self.token_times[0]

    @property
    def total_s(self) -> float:
        return self.token_times[-1]

    @property
    def second_gap_s(self) -> float:
        return self.token_times[1] - self.token_times[0]

    @property
    def gaps_s(self) -> list[float]:
        """From the second token on: the gap before it is a hand-off's and counted by itself."""
        return gaps(self.token_times[1:])

    @property
    def itl_s(self) -> list[float]:
        """Between all consecutive tokens; zeros where several came in one message."""
        return gaps(self.token_times)


def gaps(times: Sequence[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` % of the others do not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def ttft_ms(answer: Answer) -> float:
    return answer.ttft_s * 1e3


def itl_p50_ms(answer: Answer) -> float:
    return statistics.median(answer.itl_s) * 1e3


def itl_p99_ms(answer: Answer) -> float:
    return percentile(answer.itl_s, 99) * 1e3


def single_stream_rate(answer: Answer) -> float:
    """Tokens a second, the wait for the first one included."""
    return len(answer.token_times) / answer.total_s
