"""What is asked must be what the workload says: lengths, prompts that repeat or do not, streams that are ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence

import pytest

from benchmarks.serve import workloads
from benchmarks.serve.endpoints import Piece, ask
from benchmarks.serve.workloads import LONG, NUM_SHARED, NUM_STEADY, STEADY, W2, sharing, steady_and_long, together

VOCAB = 1000


class FakeEndpoint:
    """Answers at once, or after `first_s` a token every `pause_s`; remembers what it was asked and how many streams were left early."""

    def __init__(self, pause_s: float = 0.0, num_missing: int = 0, first_s: float = 0.0) -> None:
        self.prompts: list[Sequence[int]] = []
        self.num_left = 0
        self._pause_s = pause_s
        self._num_missing = num_missing
        self._first_s = first_s
        self._lock = threading.Lock()

    def stream(self, prompt: Sequence[int], output_tokens: int) -> Generator[Piece, None, None]:
        with self._lock:
            self.prompts.append(prompt)
        num_sent = 0
        time.sleep(self._first_s)
        try:
            for _ in range(output_tokens - self._num_missing):
                time.sleep(self._pause_s)
                yield Piece(1)
                num_sent += 1
        finally:
            with self._lock:
                self.num_left += num_sent < output_tokens


def test_an_answer_that_is_too_short_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="8 tokens were asked for, 7 came"):
        ask(FakeEndpoint(num_missing=1), [1, 2], 8)


def test_everybody_gets_the_same_prompts_and_every_turn_other_ones() -> None:
    a, b, c = FakeEndpoint(), FakeEndpoint(), FakeEndpoint()
    for endpoint, seed in ((a, 1), (b, 1), (c, 2)):
        together(endpoint, VOCAB, seed, W2, 4)
    assert sorted(map(tuple, a.prompts)) == sorted(map(tuple, b.prompts))
    assert len({tuple(p) for p in (*a.prompts, *c.prompts)}) == 8
    assert {len(p) for p in a.prompts} == {W2.prompt}


def test_prompts_share_what_they_should_and_no_more() -> None:
    first, second = FakeEndpoint(), FakeEndpoint()
    sharing(first, VOCAB, 1)
    sharing(second, VOCAB, 2)
    starts = {tuple(p[:NUM_SHARED]) for p in first.prompts}
    assert len(starts) == 1 and starts.isdisjoint({tuple(p[:NUM_SHARED]) for p in second.prompts})
    assert len({tuple(p[NUM_SHARED:]) for p in first.prompts}) == len(first.prompts)


def test_steady_streams_start_again_until_the_last_long_prompt_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "FIRST_LONG_S", 0.05)
    endpoint = FakeEndpoint(pause_s=0.0005, first_s=0.7)  # then a steady request lasts 0.15 s
    found = steady_and_long(endpoint, VOCAB, "1", num_long=3, every_s=0.2)
    long = [p for p in endpoint.prompts if len(p) == LONG.prompt]
    steady = [p for p in endpoint.prompts if len(p) == STEADY.prompt]
    assert len(long) == len(found.long_ttft_s) == 3
    assert len(steady) > NUM_STEADY  # started again
    assert len({tuple(p) for p in steady}) == len(steady)
    assert endpoint.num_left == NUM_STEADY  # and in the end left in the middle, closed
    assert max(found.itl_s) < 0.7  # a gap between two requests is nobody's latency between tokens


def test_a_long_prompt_that_fails_ends_the_steady_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "FIRST_LONG_S", 0.0)

    class Failing(FakeEndpoint):
        def stream(self, prompt: Sequence[int], output_tokens: int) -> Generator[Piece, None, None]:
            if len(prompt) == LONG.prompt:
                raise RuntimeError("no room")
            return super().stream(prompt, output_tokens)

    with pytest.raises(RuntimeError, match="no room"):
        steady_and_long(Failing(pause_s=0.0005), VOCAB, "1", num_long=1, every_s=0.0)
