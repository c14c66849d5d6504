"""How much of the time in which workers of one role were busy those of the other were too. Pure."""

from __future__ import annotations

from collections.abc import Sequence

Spans = Sequence[tuple[float, float]]  # when one worker was busy: from, to


def shares(prefills: Sequence[Spans], decodes: Sequence[Spans]) -> tuple[float, float]:
    """Of the time in which a worker computes prompts, in how much of it another one decodes; and the other way round: means over all
    pairs. Requests come in bursts, so these are more than the shares of all the time in which they are busy."""
    changes = sorted(
        change
        for role, workers in enumerate((prefills, decodes))
        for spans in workers
        for begin, end in spans
        for change in ((begin, role, 1), (end, role, -1))
    )
    num_busy, busy_s, both_s, before = [0, 0], [0.0, 0.0], 0.0, 0.0
    for at, role, more in changes:
        for each in (0, 1):
            busy_s[each] += num_busy[each] * (at - before)
        both_s += num_busy[0] * num_busy[1] * (at - before)
        num_busy[role] += more
        before = at
    of_prompts, of_steps = busy_s[0] * len(decodes), busy_s[1] * len(prefills)
    return (both_s / of_prompts if of_prompts else 0.0, both_s / of_steps if of_steps else 0.0)
