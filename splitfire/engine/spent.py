"""Where an engine's time goes: of all its steps, and of the chunks of one prompt. Written by the engine thread; `Spent` is frozen
and may be read anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_CHUNKS = 16  # of one prompt that are told apart; more are told in pairs, and so on


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds, of all steps since the engine was made."""

    num_steps: int = 0
    schedule_s: float = 0.0  # who is in a step
    draft_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0  # 0 where the device does it within the forward pass
    row_s: float = 0.0  # each step's time over its rows: who had a row in all of them used so much

    def plus(self, *, schedule_s: float, draft_s: float, forward_s: float, sample_s: float, num_rows: int) -> Spent:
        """One more step of `num_rows` rows."""
        took_s = schedule_s + draft_s + forward_s + sample_s
        return Spent(
            self.num_steps + 1,
            self.schedule_s + schedule_s,
            self.draft_s + draft_s,
            self.forward_s + forward_s,
            self.sample_s + sample_s,
            self.row_s + took_s / num_rows,
        )

    def since(self, earlier: Spent) -> Spent:
        """What came after `earlier`."""
        return Spent(
            self.num_steps - earlier.num_steps,
            self.schedule_s - earlier.schedule_s,
            self.draft_s - earlier.draft_s,
            self.forward_s - earlier.forward_s,
            self.sample_s - earlier.sample_s,
            self.row_s - earlier.row_s,
        )


NOTHING_SPENT = Spent()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A step's slice of one prompt, or several one after another."""

    waited_s: float  # since the chunk before it: other steps
    took_s: float  # the whole step
    num_tokens: int
    share_s: float  # of that step, by rows
    num_steps: int = 1


@dataclass(slots=True)
class SequenceTimes:
    """Instants on this process's monotonic clock, seconds; None until they happen. From `started` on, the chunks and the waits
    before them add up to `prompt_done`."""

    started: float | None = None  # first scheduled
    prompt_done: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    _ended: float = 0.0

    def add_chunk(self, began: float, ended: float, num_tokens: int, num_rows: int) -> None:
        """One more slice of the prompt was computed."""
        before = self._ended if self.chunks else self.started
        waited_s = began - before if before is not None else 0.0
        self.chunks.append(Chunk(waited_s, ended - began, num_tokens, (ended - began) * num_tokens / num_rows))
        self._ended = ended
        if len(self.chunks) > MAX_CHUNKS:
            self.chunks = [join_chunks(self.chunks[i : i + 2]) for i in range(0, len(self.chunks), 2)]


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """As one."""
    return Chunk(
        sum(c.waited_s for c in chunks),
        sum(c.took_s for c in chunks),
        sum(c.num_tokens for c in chunks),
        sum(c.share_s for c in chunks),
        sum(c.num_steps for c in chunks),
    )
