"""The engine: schedule, run, update. One thread calls `step`; the lock lets intake take and give blocks meanwhile.

Life of a sequence here:
 1. `add` queues it, or `lending` lends blocks for one whose KV will arrive, and `join` puts it into the running batch.
 2. `step` asks for drafts, schedules, runs the model, appends the drawn tokens (those drafts that were right, and one more),
    and reports what happened (updates.py).
 3. A PREFILL sequence is held after its first token, until `finish`; a GENERATE sequence finishes by itself.
 4. `finish` ends any sequence at any time; its blocks are free when it returns.

The lock guards scheduler and block pool. It is never held while the model runs, so a grant waits for a schedule
(well under a millisecond) and never for a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from splitfire.core.lifecycle import Seq as SeqState
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drafting import Speculator
from splitfire.engine.drawing import Drawn, StepTokens
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.lanes import Decoding
from splitfire.engine.lending import Lending, Reservation
from splitfire.engine.proposals import Proposals
from splitfire.engine.runner import Runner
from splitfire.engine.scheduler import Budget, Scheduler, Slice, Step, newest
from splitfire.engine.sequence import Purpose, SeqId, Sequence, SequenceSpec
from splitfire.engine.updates import DraftCounts, EngineLoad, PlainTokens, SequenceUpdate, StepResult

RATE_SMOOTHING = 0.2  # of each new measurement
MAX_CHUNK_S = 0.25  # cancel and admission are looked at between steps, so no step may take much longer
NOTHING = StepResult(PlainTokens(), (), 0, 0.0)


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
        block_size = runner.pool.layout.block_size
        self._scheduler = Scheduler(blocks, budget, block_size)
        self.lending = Lending(self._scheduler, self.lock, block_size)
        self._budget = budget
        self._block_size = block_size
        self._clock = clock
        self._proposals = Proposals(speculator)
        self._sequences: dict[SeqId, Sequence] = {}
        self._arrivals = 0
        self._prefill_rate = 0.0
        self._decode_rate = 0.0
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
        sequence.num_cached = reservation.num_pinned * sequence.block_size
        sequence.tokens.append(first_token)
        if sequence.constraint is not None:
            sequence.constraint.advance(first_token)
        sequence.block_ids = reservation.block_ids
        sequence.num_committed_blocks = spec.num_tokens // sequence.block_size
        with self.lock:
            for block_id in reservation.block_ids[sequence.num_committed_blocks :]:
                self.blocks.begin_filling(block_id)
            self._scheduler.join(sequence)

    def finish(self, seq_id: SeqId) -> None:
        """Ends a sequence now; unknown ids are ones that finished already."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            with self.lock:
                self._scheduler.finish(sequence)
            self._proposals.forget(seq_id)

    def step(self) -> StepResult:
        """Computes one step. Blocks for as long as the model takes."""
        began = self._clock()
        lanes = self._scheduler.lanes
        decoding = lanes.at(lanes.decoding.lanes) if self._proposals.is_on else []
        drafts = self._proposals.ask(decoding, self._budget.chunk_tokens + self._budget.max_running - len(decoding))
        with self.lock:
            step = self._scheduler.schedule(self._chunk_limit(), drafts)
        if not step.num_rows:
            return NOTHING
        self._start(step, began)
        drawn = self.runner.run(step)
        ended = self._clock()
        events: list[SequenceUpdate] = []
        with self.lock:
            plain = self._update_decoding(step.decoding, drawn, events, ended)
            events += [self._update(piece, drawn.slices.get(i), ended) for i, piece in enumerate(step.slices)]
            self._proposals.count(events)
        result = StepResult(plain, tuple(events), step.num_rows, ended - began)
        self._measure(step, result)
        self._proposals.tell(result)
        return result

    # -- any thread

    def load(self) -> EngineLoad:
        with self.lock:
            scheduler = self._scheduler
            return EngineLoad(
                total_blocks=self.blocks.num_blocks,
                available_blocks=self.blocks.num_available,
                running=len(scheduler.running) + len(scheduler.held) + scheduler.num_reserved,
                waiting=len(scheduler.waiting),
                queued_tokens=scheduler.num_waiting_tokens,
                prefill_tokens_per_s=self._prefill_rate,
                decode_tokens_per_s=self._decode_rate,
            )

    def draft_counts(self) -> dict[str, DraftCounts]:
        """By drafter."""
        with self.lock:
            return self._proposals.counts()

    # -- inside

    def _chunk_limit(self) -> int | None:
        """Tokens that MAX_CHUNK_S is enough for at the measured rate, in whole blocks; None until measured."""
        size = self._block_size
        return max(1, int(self._prefill_rate * MAX_CHUNK_S) // size) * size if self._prefill_rate else None

    def _new_sequence(self, spec: SequenceSpec) -> Sequence:
        sequence = Sequence(spec, self._arrivals, self._block_size)
        self._arrivals += 1
        self._sequences[spec.seq_id] = sequence
        return sequence

    def _start(self, step: Step, now: float) -> None:
        """Prompts whose first chunk this is."""
        starting = [piece.sequence for piece in step.slices if piece.sequence.times.started is None]
        for sequence in starting:
            sequence.times.started = now
        if starting:
            self.on_started(tuple(s.spec.seq_id for s in starting))

    def _update_decoding(self, decoding: Decoding, drawn: StepTokens, events: list[SequenceUpdate], ended: float) -> PlainTokens:
        """One more token for each that decodes; those that end with it, or get more than a token, are told in `events`."""
        lanes, token_ids = self._scheduler.lanes, drawn.token_ids
        if drawn.others:
            is_plain = np.ones(len(decoding), np.bool_)
            is_plain[list(drawn.others)] = False
            for i, sequence in zip(sorted(drawn.others), lanes.at(decoding.lanes[~is_plain]), strict=True):
                events.append(self._update(newest(sequence), drawn.others[i], ended))
            decoding, token_ids = decoding.where(is_plain), token_ids[is_plain]
        appended = lanes.append(decoding, token_ids)
        seq_ids, offsets = lanes.seq_ids[decoding.lanes], appended.offsets
        for sequence in lanes.at(decoding.lanes[appended.has_filled]):
            self._scheduler.commit(sequence)
        if appended.has_ended.any():
            at = appended.has_ended.nonzero()[0]
            ending = zip(at.tolist(), lanes.at(decoding.lanes[at]), strict=True)
            events += [self._finished(s, int(offsets[i]), bool(appended.has_stopped[i])) for i, s in ending]
            goes_on = ~appended.has_ended
            seq_ids, offsets, token_ids = seq_ids[goes_on], offsets[goes_on], token_ids[goes_on]
        return PlainTokens(seq_ids.tolist(), offsets.tolist(), token_ids.tolist())

    def _finished(self, sequence: Sequence, offset: int, stopped: bool) -> SequenceUpdate:
        """Its newest token is its last."""
        token = SampledToken(sequence.tokens[-1], None, ())
        update = SequenceUpdate(
            sequence.spec.seq_id, sequence.num_computed, (), offset, (token,), is_finished=True, stopped=stopped
        )
        self._end(sequence)
        return update

    def _update(self, piece: Slice, drawn: Drawn | None, ended: float) -> SequenceUpdate:
        """Appends the drawn tokens and moves the sequence on. Under the lock."""
        sequence, spec = piece.sequence, piece.sequence.spec
        offset = sequence.num_output
        for_shipping = spec.purpose is Purpose.PREFILL
        block_ids = tuple(sequence.block_ids) if for_shipping else ()
        if drawn is None:
            self._scheduler.computed(piece)
            return SequenceUpdate(spec.seq_id, sequence.num_computed, block_ids, offset)
        if not drawn.tokens:  # what is not finite is shared with nobody
            self.blocks.forget(sequence.block_ids)  # whoever asks the same again would fail of the same KV
            self._end(sequence)
            return SequenceUpdate(spec.seq_id, 0, (), offset, is_finished=True, error=drawn.error)
        is_first = offset == len(spec.output)
        if is_first:
            sequence.times.prompt_done = ended
        sequence.tokens.extend(token.token_id for token in drawn.tokens)
        self._scheduler.computed(piece)
        num_computed = sequence.num_computed
        num_sure = len(drawn.tokens) - 1  # the last one has no KV, also where it is a draft too
        stopped = drawn.is_over or sequence.tokens[-1] in spec.stopping.stop_token_ids
        is_finished = stopped or sequence.num_left <= 0
        if is_finished:
            self._end(sequence)
        elif for_shipping:
            self._scheduler.hold(sequence)
        elif not sequence.is_decoding:
            self._scheduler.decode(sequence)
        return SequenceUpdate(
            spec.seq_id,
            num_computed,
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

    def _measure(self, step: Step, result: StepResult) -> None:
        """Running rates of steps that only compute prompts (their tokens) or only decode (tokens got); mixed steps tell neither."""
        duration_s = max(result.duration_s, 1e-9)
        num_decoding = len(step.decoding) + sum(s.end - s.begin == 1 for s in step.slices)
        if num_decoding == 0:
            rate = result.num_rows / duration_s
            self._prefill_rate += (RATE_SMOOTHING if self._prefill_rate else 1.0) * (rate - self._prefill_rate)
        elif num_decoding == len(step.decoding) + len(step.slices):
            rate = (len(result.plain.token_ids) + sum(len(u.tokens) for u in result.events)) / duration_s
            self._decode_rate += (RATE_SMOOTHING if self._decode_rate else 1.0) * (rate - self._decode_rate)
