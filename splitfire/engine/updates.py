"""What an engine tells: what one step meant for each sequence, and how much there is to do."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from splitfire.engine.blocks import BlockId
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.sequence import SeqId
from splitfire.engine.spent import NOTHING_SPENT, SequenceTimes, Spent


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What one step meant for one sequence."""

    seq_id: SeqId
    num_computed: int
    block_ids: tuple[BlockId, ...]  # of a PREFILL sequence, for shipping; else empty
    offset: int  # of the first of `tokens` among all output tokens
    tokens: tuple[SampledToken, ...] = ()
    num_drafted: int = 0
    num_accepted: int = 0  # drafts that are among `tokens`
    is_finished: bool = False
    stopped: bool = False  # finished by a stop token or the end of its grammar rather than by length
    error: str = ""  # the sequence failed alone
    num_cached: int = 0
    times: SequenceTimes | None = None  # with the first token
    forks: tuple[SequenceUpdate, ...] = ()  # of a PREFILL sequence that is several choices, when its prompt is computed


@dataclass(frozen=True, slots=True)
class PlainTokens:
    """What most decoding sequences get of a step, as columns of one length: one token and no more to say about it."""

    seq_ids: Seq[SeqId] = ()
    offsets: Seq[int] = ()  # among all output tokens
    token_ids: Seq[int] = ()

    def __iter__(self) -> Iterator[tuple[SeqId, int, int]]:
        return zip(self.seq_ids, self.offsets, self.token_ids, strict=True)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did. A sequence is in `plain` or in `events`, never in both."""

    plain: PlainTokens
    events: tuple[SequenceUpdate, ...]
    num_rows: int
    duration_s: float
    spent: Spent = NOTHING_SPENT  # of all steps, this one the last of them

    @property
    def updates(self) -> list[SequenceUpdate]:
        """All of it in the long form."""
        return [*(plain_update(*row) for row in self.plain), *self.events]


def plain_update(seq_id: SeqId, offset: int, token_id: int) -> SequenceUpdate:
    """The long form of one row of `PlainTokens`, but for `num_computed`, which nobody asks of a sequence that decodes."""
    return SequenceUpdate(seq_id, 0, (), offset, (SampledToken(token_id, None, ()),))


@dataclass(slots=True)
class DraftCounts:
    """Tokens one drafter proposed, as far as they were verified, and how many of them were right."""

    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot for placement and for people."""

    total_blocks: int
    available_blocks: int
    running: int
    waiting: int
    queued_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    step_s: float = 0.0  # of a step that only decodes
    cached_blocks: int = 0  # in the prefix cache, in use or not
    reserved_blocks: int = 0  # lent to hand-offs that have not joined
