"""The engine: schedule, run, update. One thread calls `step`; the lock lets intake take and give blocks meanwhile.

Life of a sequence here:
 1. `add` queues it, or `reserve` lends blocks for one whose KV will arrive, and `join` puts it into the running batch.
 2. `step` asks for drafts, schedules slices, runs the model, appends the drawn tokens (those drafts that were right, and one
    more), and reports what happened as `SequenceUpdate`s.
 3. A PREFILL sequence is held after its first token, until `finish`; a GENERATE sequence finishes by itself.
 4. `finish` ends any sequence at any time; its blocks are free when it returns.

The lock guards scheduler and block pool. It is never held while the model runs, so a grant waits for a schedule
(well under a millisecond) and never for a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from splitfire.core.hashing import BlockHash
from splitfire.core.lifecycle import Seq as SeqState
from splitfire.engine.blocks import BlockId, BlockPool, BlockState
from splitfire.engine.drafting import Draft, Speculator, Verified
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.runner import Drawn, Runner
from splitfire.engine.scheduler import Budget, Scheduler, Slice
from splitfire.engine.sequence import Purpose, SeqId, Sequence, SequenceSpec, SequenceTimes

RATE_SMOOTHING = 0.2  # of each new measurement
MAX_CHUNK_S = 0.25  # cancel and admission are looked at between steps, so no step may take much longer


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
    stopped: bool = False  # finished by a stop token rather than by length
    error: str = ""  # the sequence failed alone
    num_cached: int = 0
    times: SequenceTimes | None = None  # with the first token


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, in the order of its sequences."""

    updates: tuple[SequenceUpdate, ...]
    num_rows: int
    duration_s: float


@dataclass(slots=True)
class DraftCounts:
    """Tokens one drafter proposed, as far as they were verified, and how many of them were right."""

    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(slots=True)
class Reservation:
    """Blocks lent to intake: the leading `num_pinned` are shared from the prefix cache, the rest RESERVED.

    Owned by the io thread from `reserve` until `join` or `forfeit`.
    """

    spec: SequenceSpec
    block_ids: list[BlockId]
    num_pinned: int


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


class Engine:
    """One model, one pool. `step`, `add`, `join` and `finish` belong to the engine thread; the rest may be called anywhere."""

    def __init__(
        self,
        runner: Runner,
        blocks: BlockPool,
        budget: Budget,
        clock: Callable[[], float],
        speculator: Speculator | None = None,
    ) -> None:
        self.runner = runner
        self.blocks = blocks
        self.lock = threading.Lock()
        self._scheduler = Scheduler(blocks, budget)
        self._budget = budget
        self._clock = clock
        self._sequences: dict[SeqId, Sequence] = {}
        self._arrivals = 0
        self._num_reserved = 0
        self._prefill_rate = 0.0
        self._decode_rate = 0.0
        self._speculator = speculator
        self._draft_counts: dict[str, DraftCounts] = {}
        self.on_started: Callable[[tuple[SeqId, ...]], None] = lambda ids: None

    # -- engine thread

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def add(self, spec: SequenceSpec) -> None:
        """Queues a sequence whose prompt is to be computed here."""
        sequence = self._new_sequence(spec)
        with self.lock:
            self._scheduler.add(sequence)

    def join(self, reservation: Reservation, first_token: int) -> None:
        """Every block of the reservation has been committed: the sequence goes on from the token after `first_token`."""
        spec = reservation.spec
        sequence = self._new_sequence(spec)
        sequence.num_computed = spec.num_tokens
        sequence.num_cached = reservation.num_pinned * sequence.block_size
        sequence.tokens.append(first_token)
        sequence.block_ids = reservation.block_ids
        sequence.num_committed_blocks = spec.num_tokens // sequence.block_size
        with self.lock:
            self._num_reserved -= 1
            for block_id in reservation.block_ids[sequence.num_committed_blocks :]:
                self.blocks.begin_filling(block_id)
            self._scheduler.join(sequence)

    def finish(self, seq_id: SeqId) -> None:
        """Ends a sequence now; unknown ids are ones that finished already."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            with self.lock:
                self._scheduler.finish(sequence)
            self._forget(seq_id)

    def step(self) -> StepResult:
        """Computes one step. Blocks for as long as the model takes."""
        began = self._clock()
        drafts = self._propose()
        with self.lock:
            slices = self._scheduler.schedule(self._chunk_limit(), drafts)
        if not slices:
            return StepResult((), 0, 0.0)
        starting = [piece.sequence for piece in slices if piece.sequence.times.started is None]
        for sequence in starting:
            sequence.times.started = began
        if starting:
            self.on_started(tuple(s.spec.seq_id for s in starting))
        drawn = self.runner.run(slices)
        ended = self._clock()
        with self.lock:
            updates = tuple(self._update(piece, drawn.get(i), ended) for i, piece in enumerate(slices))
        result = StepResult(updates, sum(s.num_rows for s in slices), ended - began)
        self._measure(slices, result)
        self._learn(slices, drafts, result)
        return result

    # -- any thread

    @property
    def is_short(self) -> bool:
        """Sequences that run may soon find no block, while some are lent to intake."""
        with self.lock:
            num_running = len(self._scheduler.running)
            return self._num_reserved > 0 and num_running > 0 and self.blocks.num_available < (num_running + 1) // 2

    def reserve(self, spec: SequenceSpec) -> Reservation | None:
        """Blocks for a sequence whose KV will arrive; None when there are not enough, or too many sequences, right now.
        A block for each running sequence is left."""
        size = self.runner.pool.layout.block_size
        wanted = self.runner.pool.layout.blocks_for(spec.num_tokens)
        with self.lock:
            if self._num_reserved + len(self._scheduler.running) >= self._budget.max_running:
                return None
            pinned = self.blocks.match(spec.block_hashes[: (spec.num_tokens - 1) // size])
            num_left = self.blocks.num_available - (wanted - len(pinned))
            rest = self.blocks.allocate(wanted - len(pinned), BlockState.RESERVED)
            if rest is None or num_left < len(self._scheduler.running):
                self.blocks.release([*pinned, *(rest or ())])
                return None
            self._num_reserved += 1
        return Reservation(spec, [*pinned, *rest], len(pinned))

    def commit(self, reservation: Reservation, first_block: int, num_blocks: int, names: Seq[BlockHash]) -> None:
        """Blocks [first_block, first_block + num_blocks) of a reservation were verified and written; full ones get shareable."""
        full = reservation.spec.num_tokens // self.runner.pool.layout.block_size
        with self.lock:
            for block in range(first_block, min(first_block + num_blocks, full)):
                self.blocks.commit(reservation.block_ids[block], names[block])

    def forfeit(self, reservation: Reservation) -> None:
        """Gives a reservation's blocks back; nothing joins."""
        with self.lock:
            self._num_reserved -= 1
            self.blocks.release(reservation.block_ids)
        reservation.block_ids = []

    def load(self) -> EngineLoad:
        with self.lock:
            scheduler = self._scheduler
            return EngineLoad(
                total_blocks=self.blocks.num_blocks,
                available_blocks=self.blocks.num_available,
                running=len(scheduler.running) + len(scheduler.held) + self._num_reserved,
                waiting=len(scheduler.waiting),
                queued_tokens=scheduler.num_waiting_tokens,
                prefill_tokens_per_s=self._prefill_rate,
                decode_tokens_per_s=self._decode_rate,
            )

    def draft_counts(self) -> dict[str, DraftCounts]:
        """By drafter."""
        with self.lock:
            return {source: replace(counts) for source, counts in self._draft_counts.items()}

    # -- inside

    def _propose(self) -> Mapping[SeqId, Draft]:
        """Drafts for whoever decodes; the scheduler cuts them."""
        if self._speculator is None:
            return {}
        decoding = [s for s in self._scheduler.running if s.is_decoding and s.spec.purpose is Purpose.GENERATE]
        room = self._budget.chunk_tokens + self._budget.max_running - len(decoding)
        return self._speculator.propose(decoding, room) if decoding else {}

    def _learn(self, slices: Seq[Slice], drafts: Mapping[SeqId, Draft], result: StepResult) -> None:
        """Tells the speculator what became of its drafts, and who has ended."""
        if self._speculator is None:
            return
        verified = []
        with self.lock:
            for piece, update in zip(slices, result.updates, strict=True):
                if not piece.decodes or update.error:
                    continue
                draft = replace(drafts[update.seq_id], token_ids=piece.drafts) if piece.drafts else None
                ids = tuple(token.token_id for token in update.tokens)
                verified.append(Verified(update.seq_id, draft, update.num_accepted, ids))
                if draft is not None:
                    counts = self._draft_counts.setdefault(draft.source, DraftCounts())
                    counts.num_drafted += update.num_drafted
                    counts.num_accepted += update.num_accepted
        self._speculator.verified(verified, result.num_rows, result.duration_s)
        for update in result.updates:
            if update.is_finished:
                self._speculator.forget(update.seq_id)

    def _forget(self, seq_id: SeqId) -> None:
        if self._speculator is not None:
            self._speculator.forget(seq_id)

    def _chunk_limit(self) -> int | None:
        """Tokens that MAX_CHUNK_S is enough for at the measured rate, in whole blocks; None until measured."""
        size = self.runner.pool.layout.block_size
        return max(1, int(self._prefill_rate * MAX_CHUNK_S) // size) * size if self._prefill_rate else None

    def _new_sequence(self, spec: SequenceSpec) -> Sequence:
        sequence = Sequence(spec, self._arrivals, self.runner.pool.layout.block_size)
        self._arrivals += 1
        self._sequences[spec.seq_id] = sequence
        return sequence

    def _update(self, piece: Slice, drawn: Drawn | None, ended: float) -> SequenceUpdate:
        """Appends the drawn tokens and moves the sequence on. Under the lock."""
        sequence, spec = piece.sequence, piece.sequence.spec
        offset = sequence.num_output
        is_first = offset == len(spec.output)
        for_shipping = spec.purpose is Purpose.PREFILL
        block_ids = tuple(sequence.block_ids) if for_shipping else ()
        if drawn is None:
            self._scheduler.computed(piece)
            return SequenceUpdate(spec.seq_id, sequence.num_computed, block_ids, offset)
        if not drawn.tokens:  # what is not finite is shared with nobody
            self.blocks.forget(sequence.block_ids)  # whoever asks the same again would fail of the same KV
            self._end(sequence)
            return SequenceUpdate(spec.seq_id, sequence.num_computed, (), offset, is_finished=True, error=drawn.error)
        if is_first:
            sequence.times.prompt_done = ended
        sequence.tokens.extend(token.token_id for token in drawn.tokens)
        num_sure = len(drawn.tokens) - 1  # the last one has no KV, also where it is a draft too
        self._scheduler.computed(piece, num_sure)
        stopped = sequence.tokens[-1] in spec.stopping.stop_token_ids
        is_finished = stopped or sequence.num_output >= spec.stopping.max_tokens
        if is_finished:
            self._end(sequence)
        elif for_shipping:
            self._scheduler.hold(sequence)
        return SequenceUpdate(
            spec.seq_id,
            sequence.num_computed,
            block_ids,
            offset,
            tokens=drawn.tokens,
            num_drafted=len(piece.drafts),
            num_accepted=num_sure + (piece.drafts[num_sure : num_sure + 1] == (sequence.tokens[-1],)),
            is_finished=is_finished,
            stopped=stopped,
            num_cached=sequence.num_cached,
            times=sequence.times if is_first else None,
        )

    def _end(self, sequence: Sequence) -> None:
        self._sequences.pop(sequence.spec.seq_id, None)
        self._scheduler.finish(sequence)
        assert sequence.state is SeqState.FINISHED

    def _measure(self, slices: Seq[Slice], result: StepResult) -> None:
        """Running rates of steps that only compute prompts (their tokens) or only decode (tokens got); mixed steps tell neither."""
        duration_s = max(result.duration_s, 1e-9)
        num_decoding = sum(s.end - s.begin == 1 for s in slices)
        if num_decoding == 0:
            rate = result.num_rows / duration_s
            self._prefill_rate += (RATE_SMOOTHING if self._prefill_rate else 1.0) * (rate - self._prefill_rate)
        elif num_decoding == len(slices):
            rate = sum(len(update.tokens) for update in result.updates) / duration_s
            self._decode_rate += (RATE_SMOOTHING if self._decode_rate else 1.0) * (rate - self._decode_rate)
