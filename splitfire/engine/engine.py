"""The engine: schedule, run, update. One thread calls `step`; the lock lets intake take and give blocks meanwhile.

Life of a sequence here:
 1. `add` queues it, or `lending` lends blocks for one whose KV will arrive, and `join` puts it into the running batch.
 2. `step` asks for drafts, schedules, runs the model, appends the drawn tokens (those drafts that were right, and one more),
    and reports what happened (updates.py).
 3. A PREFILL sequence is held after its first token, until `finish`; a GENERATE sequence finishes by itself.
 4. `finish` ends any sequence at any time; its blocks are free when it returns, or when the step in flight is over.

Where the runner can, the next step is scheduled and launched while one runs: it has the same sequences, whose newest tokens only
the device knows. Who ends meanwhile is computed once too often, and nothing of that is told.

The lock guards scheduler and block pool. It is never held while the model runs, so a grant waits for a schedule
(well under a millisecond) and never for a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf

from splitfire.core.hashing import BlockHash
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drafting import Draft, Speculator
from splitfire.engine.lending import Lending, Reservation
from splitfire.engine.proposals import Proposals
from splitfire.engine.runner import Launched, StepRunner
from splitfire.engine.scheduler import Budget, Scheduler, Step
from splitfire.engine.sequence import SeqId, SequenceSpec
from splitfire.engine.sequences import Sequences
from splitfire.engine.spent import Spent
from splitfire.engine.updates import DraftCounts, EngineLoad, PlainTokens, StepResult

RATE_SMOOTHING = 0.2  # of each new measurement
MAX_CHUNK_S = 0.25  # cancel and admission are looked at between steps, so no step may take much longer
NOTHING = StepResult(PlainTokens(), (), 0, 0.0)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that the device has."""

    step: Step
    launched: Launched
    began: float
    draft_s: float
    schedule_s: float


class Engine:
    """One model, one pool. `step`, `add`, `join` and `finish` belong to the engine thread; the rest may be called anywhere."""

    def __init__(
        self,
        runner: StepRunner,
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
        self._sequences = Sequences(self._scheduler, runner.pool)
        self.lending = Lending(self._scheduler, self.lock, block_size)
        self._budget = budget
        self._block_size = block_size
        self._clock = clock
        self._proposals = Proposals(speculator)
        self._prefill_rate = 0.0
        self._decode_rate = 0.0
        self._decode_step_s = 0.0
        self._ahead: _Flight | None = None  # launched behind the step whose results were told last
        self._ended = -inf  # when that was
        self._spent = Spent()
        self.on_started: Callable[[tuple[SeqId, ...]], None] = lambda ids: None

    # -- engine thread

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def add(self, spec: SequenceSpec) -> None:
        """Queues a sequence whose prompt is to be computed here."""
        with self.lock:
            self._sequences.add(spec)

    def join(self, reservation: Reservation, first_tokens: Mapping[SeqId, int]) -> None:
        """Every block of the reservation has been committed: the sequence, or each of its choices that `first_tokens` names, goes on
        from the token after the first."""
        with self.lock:
            self._sequences.join(reservation, first_tokens)

    def finish(self, seq_id: SeqId) -> None:
        """Ends a sequence now, or one choice of several; unknown ids are ones that finished already."""
        with self.lock:
            self._sequences.finish(seq_id)
        self._proposals.forget(seq_id)

    def step(self) -> StepResult:
        """One step's results. Blocks for as long as the model takes, and leaves the device the next step where that may be."""
        flight = self._ahead or self._launch()
        self._ahead = None
        if flight is None:
            return NOTHING
        step = flight.step
        if self.runner.runs_ahead and self._scheduler.may_run_behind(step) and self._proposals.can_skip(len(step.decoding)):
            self._ahead = self._launch(is_behind=True)
        drawn = flight.launched.tokens()
        ended = self._clock()
        began = max(flight.began, self._ended)
        for piece in step.slices:
            if not piece.sequence.is_decoding and piece.sequence.times.prompt_done is None:
                piece.sequence.times.add_chunk(began, ended, piece.num_rows, step.num_rows)
        with self.lock:
            plain, events = self._sequences.update(step, drawn, ended)
            self._proposals.count(events)
        self._spend(flight, ended - began)
        result = StepResult(plain, tuple(events), step.num_rows, ended - began, self._spent)
        self._ended = ended
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
                step_s=self._decode_step_s,
                cached_blocks=self.blocks.num_indexed,
                reserved_blocks=scheduler.num_reserved_blocks,
            )

    def num_missing(self, ids: Iterable[SeqId]) -> int:
        """Prompt tokens of these sequences that are to be computed; of those that decode, are held or are not here: none."""
        with self.lock:
            wanted = frozenset(ids)
            queues = (self._scheduler.waiting, self._scheduler.prefilling)
            return sum(s.num_missing for queue in queues for s in queue if s.spec.seq_id in wanted)

    def take_cache_changes(self) -> Mapping[BlockHash, bool] | None:
        """`BlockPool.take_changes`: there is one who takes them."""
        with self.lock:
            return self.blocks.take_changes()

    def cached_names(self) -> tuple[BlockHash, ...]:
        """The whole prefix cache, in the order in which it came."""
        with self.lock:
            return self.blocks.names()

    def draft_counts(self) -> dict[str, DraftCounts]:
        """By drafter."""
        with self.lock:
            return self._proposals.counts()

    # -- inside

    def _launch(self, *, is_behind: bool = False) -> _Flight | None:
        """The next step, given to the device; None when nothing can run. One behind another has no drafts: they follow its tokens."""
        began = self._clock()
        drafts: Mapping[SeqId, Draft] = {}
        if is_behind:
            self._proposals.skip(len(self._scheduler.lanes.decoding))
        elif self._proposals.is_on:
            lanes = self._scheduler.lanes
            decoding = lanes.at(lanes.decoding.lanes)
            drafts = self._proposals.ask(decoding, self._budget.chunk_tokens + self._budget.max_running - len(decoding))
        drafted = self._clock()
        with self.lock:
            step = self._scheduler.schedule(self._chunk_limit(), drafts)
        if not step.num_rows:
            return None
        self._start(step, began)
        scheduled = self._clock()
        launched = self.runner.launch(step)
        if self.runner.runs_ahead:
            self._scheduler.launched(step)
        return _Flight(step, launched, began, drafted - began, scheduled - drafted)

    def _spend(self, flight: _Flight, duration_s: float) -> None:
        """Counts a step. What was done for it while the device was busy with the one before took no time of its own."""
        is_behind = flight.began < self._ended
        draft_s, schedule_s = (0.0, 0.0) if is_behind else (flight.draft_s, flight.schedule_s)
        sample_s = flight.launched.sample_s
        forward_s = max(0.0, duration_s - draft_s - schedule_s - sample_s)
        self._spent = self._spent.plus(
            schedule_s=schedule_s, draft_s=draft_s, forward_s=forward_s, sample_s=sample_s, num_rows=flight.step.num_rows
        )

    def _chunk_limit(self) -> int | None:
        """Tokens that MAX_CHUNK_S is enough for at the measured rate, in whole blocks; None until measured."""
        size = self._block_size
        return max(1, int(self._prefill_rate * MAX_CHUNK_S) // size) * size if self._prefill_rate else None

    def _start(self, step: Step, now: float) -> None:
        """Prompts whose first chunk this is."""
        starting = [piece.sequence for piece in step.slices if piece.sequence.times.started is None]
        for sequence in starting:
            sequence.times.started = now
        if starting:
            self.on_started(tuple(s.spec.seq_id for s in starting))

    def _measure(self, step: Step, result: StepResult) -> None:
        """Running rates of steps that only compute prompts (their tokens) or only decode (tokens got, and how long they take); mixed
        steps tell neither."""
        duration_s = max(result.duration_s, 1e-9)
        num_decoding = len(step.decoding) + sum(s.end - s.begin == 1 for s in step.slices)
        if num_decoding == 0:
            rate = result.num_rows / duration_s
            self._prefill_rate += (RATE_SMOOTHING if self._prefill_rate else 1.0) * (rate - self._prefill_rate)
        elif num_decoding == len(step.decoding) + len(step.slices):
            rate = (len(result.plain.token_ids) + sum(len(u.tokens) for u in result.events)) / duration_s
            self._decode_rate += (RATE_SMOOTHING if self._decode_rate else 1.0) * (rate - self._decode_rate)
            self._decode_step_s += (RATE_SMOOTHING if self._decode_step_s else 1.0) * (duration_s - self._decode_step_s)
