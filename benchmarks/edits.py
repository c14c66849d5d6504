"""Texts that resemble an answer: a seeded editor, where edited and original run together, and what that allows at best.

The editor works in spans: their lengths geometric with mean 4 tokens, of random tokens; 60 % replace as many tokens of the
answer, 20 % are inserted, 20 % delete. At similarity s, (1 - s) of the answer's length is edited; at 0 all of it is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from splitfire.engine.speculation.costs import StepCosts

MEAN_SPAN = 4
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Edited:
    """An edited answer. `runs[i]`: tokens from the answer's token i on that stand in it one after the other."""

    token_ids: tuple[int, ...]
    runs: tuple[int, ...]


def edit(answer: Sequence[int], similarity: float, vocab_size: int, random: Random) -> Edited:
    length = len(answer)
    if similarity == 0.0:
        return Edited(tuple(random.randrange(vocab_size) for _ in answer), (0,) * length)
    spans: list[int] = []
    while (left := round((1 - similarity) * length) - sum(spans)) > 0:
        size = 1
        while random.random() > 1 / MEAN_SPAN:
            size += 1
        spans.append(min(size, left))
    places = sorted(random.sample(range(1, length), len(spans)))
    text: list[int] = []
    stands: list[int | None] = [None] * length  # of each token of the answer, where
    at = 0
    for size, place in zip(spans, places, strict=True):
        _copy(answer, at, max(at, place), text, stands)
        at = max(at, place)
        kind = random.random()
        if kind < 0.8:  # replaced or inserted
            text += (random.randrange(vocab_size) for _ in range(size))
        if kind < 0.6 or kind >= 0.8:  # replaced or deleted
            at = min(length, at + size)
    _copy(answer, at, length, text, stands)
    return Edited(tuple(text), _runs(stands))


def _copy(answer: Sequence[int], begin: int, end: int, text: list[int], stands: list[int | None]) -> None:
    for i in range(begin, end):
        stands[i] = len(text)
        text.append(answer[i])


def _runs(stands: Sequence[int | None]) -> tuple[int, ...]:
    runs = [0] * (len(stands) + 1)
    for i in range(len(stands) - 1, -1, -1):
        here = stands[i]
        if here is not None:
            goes_on = i + 1 < len(stands) and stands[i + 1] == here + 1
            runs[i] = 1 + (runs[i + 1] if goes_on else 0)
    return tuple(runs[:-1])


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Speed-ups over no drafts that the cost table allows whoever always knows where the text goes on after a difference."""

    fixed: float  # with the best fixed width: expected tokens of a verification over its cost
    knowing: float  # with the best width, and no draft at all where none of it can be right


def ceiling_of(edited: Sequence[Edited], batch: int, costs: StepCosts) -> Ceiling:
    """`batch` of them at a time, all with the same width in a step."""
    plain, added = costs.plain(batch), costs.added(batch)
    num_tokens = sum(len(each.runs) - 1 for each in edited)
    best_fixed = best_knowing = 1.0
    for width in WIDTHS:
        if width * batch >= len(added):
            continue
        verifications = [_verifications(each.runs, width) for each in edited]
        steps, useless = (sum(counts) for counts in zip(*verifications, strict=True))
        whole = plain + added[width * batch]
        best_fixed = max(best_fixed, num_tokens * plain / (steps * whole))
        best_knowing = max(best_knowing, num_tokens * plain / ((steps - useless) * whole + useless * plain))
    return Ceiling(best_fixed, best_knowing)


def _verifications(runs: Sequence[int], width: int) -> tuple[int, int]:
    """Steps from the second token to the last, and how many of them begin where the text has nothing to offer."""
    at, count, useless = 1, 0, 0
    while at < len(runs):
        count += 1
        useless += not runs[at]
        at += min(runs[at], width) + 1
    return count, useless
