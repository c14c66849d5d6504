"""Generated traces are what they claim to be."""

from __future__ import annotations

import pytest

from router.simulation.workloads import CONVERSATION, TOOLAGENT, Chat, generate


@pytest.mark.parametrize(("chat", "num_in", "num_out", "found"), [(CONVERSATION, 12035, 343, 0.40), (TOOLAGENT, 8596, 182, 0.59)])
def test_generated_traces_have_the_published_statistics(chat: Chat, num_in: int, num_out: int, found: float) -> None:
    arrivals = generate(chat, 0, chat.num_requests).arrivals
    seen: set[int] = set()
    num_found = 0
    for arrival in arrivals:
        num_found += 512 * sum(name in seen for name in arrival.names)
        seen.update(arrival.names)
    total = sum(arrival.num_tokens for arrival in arrivals)
    assert total / len(arrivals) == pytest.approx(num_in, rel=0.03)
    assert sum(arrival.num_output for arrival in arrivals) / len(arrivals) == pytest.approx(num_out, rel=0.03)
    assert num_found / total == pytest.approx(found, abs=0.02)
