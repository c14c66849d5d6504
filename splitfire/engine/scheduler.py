"""Which sequences compute how many tokens in the next step. Pure: no tensors, no clock, no threads.

One rule serves both roles: every sequence that decodes goes first (one token each), then comes a chunk of a prompt, of one class the
one with least to compute, unless it has been passed often enough. Others join it as long as that is nearly free: beyond the rows that
saturate the processor each of them would only put off the first token of those before it. Drafts come last:
they fill the step up to `chunk_tokens + max_running` rows, so that they take nothing from prompts and always have as many rows as there
may be sequences, and they never make anybody give way: a draft is cut to the blocks that are there, and to what the sequence may still
get. What it does not need after all goes back after the step.

A prompt takes room for all of it when it is admitted, and a block has to be left then for each sequence that still grows. So only
decoding sequences ever need a block and find none, and only after as many blocks of output as there are such sequences. Room is
then made by preempting the newest of the lowest class; a preempted sequence gives all its blocks back and computes again later,
its tokens kept. The oldest of the highest class is never preempted, so there is always progress.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from collections.abc import Sequence as Seqs
from dataclasses import dataclass

import numpy as np

from splitfire.core.lifecycle import Seq, SeqEvent
from splitfire.engine.blocks import BlockCopy, BlockPool
from splitfire.engine.drafting import Draft
from splitfire.engine.lanes import Decoding, Ints, Lanes
from splitfire.engine.sequence import Purpose, SeqId, Sequence, SequenceSpec

AGEING = 3  # a prompt is passed by shorter ones until they have taken as many times its own tokens


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one step. Prompts get what decoding sequences leave of `chunk_tokens`; with drafts a step has at most
    `chunk_tokens + max_running` rows. `saturating_rows` are as many as a step computes in the time that it takes to read the weights
    (the ridge of its roofline): each further one makes it longer by as much; None: no step has so many."""

    chunk_tokens: int
    max_running: int
    saturating_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens [begin, end) of one sequence, computed in this step, and `drafts` that may follow them. `samples` when they reach
    its end: then there is a token to draw after the last of them and after each draft."""

    sequence: Sequence
    begin: int
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.end - self.begin + len(self.drafts)

    @property
    def samples(self) -> bool:
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """What to compute. Rows are those of `decoding`, then those of each slice: prompt chunks, and newest tokens with drafts."""

    lanes: Lanes
    decoding: Decoding
    slices: Seqs[Slice]

    @property
    def num_rows(self) -> int:
        return len(self.decoding) + sum(piece.num_rows for piece in self.slices)

    def pieces(self) -> list[Slice]:
        """All of it one by one, in order; what a step is really made of has a faster way (batch.py)."""
        return [*(newest(s) for s in self.lanes.at(self.decoding.lanes)), *self.slices]


def newest(sequence: Sequence) -> Slice:
    """The newest token alone."""
    return Slice(sequence, sequence.num_tokens - 1, sequence.num_tokens)


class Scheduler:
    """Owns which sequences wait, run and are held. Used under the engine's lock."""

    def __init__(self, pool: BlockPool, budget: Budget, block_size: int) -> None:
        self.pool = pool
        self.budget = budget
        self.lanes = Lanes(budget.max_running, block_size)
        self.waiting: list[Sequence] = []  # in order of class and turn, as `prefilling`
        self.running: list[Sequence] = []  # in order of class and arrival
        self.prefilling: list[Sequence] = []  # those of `running` that do not decode
        self.held: dict[SeqId, Sequence] = {}
        self.num_reserved = 0  # lanes promised to sequences whose KV is on its way
        self.num_reserved_blocks = 0  # and their blocks
        self.num_preemptions = 0
        self._leaving: list[Sequence] = []  # ended, while a step in flight still writes into their blocks
        self._num_queued_tokens = 0  # of `waiting`
        self._num_prefilled = 0  # prompt tokens computed so far: the clock of turns

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens not computed yet, queued or running."""
        return self._num_queued_tokens + sum(s.num_missing for s in self.prefilling)

    @property
    def num_free_lanes(self) -> int:
        return self.budget.max_running - len(self.running) - self.num_reserved

    @property
    def num_growing(self) -> int:
        """Sequences that will need another block: those that run, those that a prompt will become, those whose KV is on its way."""
        choices = [s for s in self.prefilling if s.forks and s.spec.purpose is Purpose.GENERATE]
        return self.lanes.num_growing + sum(len(s.forks) - 1 for s in choices) + self.num_reserved

    def has_room(self, spec: SequenceSpec, num_tokens: int, num_shared: int, num_kept: int = 0) -> bool:
        """Whether a sequence of `num_tokens`, `num_shared` of its blocks here already, can come in and leave `num_kept` blocks, and
        one for each sequence that grows, itself included. Alone it always can, if it can ever end."""
        num_blocks = -(-num_tokens // self.lanes.block_size)
        grows = spec.ends_at - 1 > num_blocks * self.lanes.block_size
        return num_blocks - num_shared + grows + self.num_growing + num_kept <= self.pool.num_available

    def first_before(self, spec: SequenceSpec) -> Sequence | None:
        """Who waits for room, and gets it before `spec`."""
        return self.waiting[0] if self.waiting and self.waiting[0].spec.priority >= spec.priority else None

    def add(self, sequence: Sequence) -> None:
        if sequence.turn is None:
            found = self.pool.match(sequence.shareable_names())
            self.pool.release(found)
            num_missing = sequence.num_tokens - len(found) * self.lanes.block_size
            sequence.turn = self._num_prefilled + AGEING * num_missing
        insort(self.waiting, sequence, key=_turn)
        self._num_queued_tokens += sequence.num_tokens

    def join(self, sequence: Sequence) -> None:
        """A sequence whose blocks arrived from elsewhere; it decodes from the next step on."""
        self._run(sequence)
        self.lanes.decode(sequence)

    def fork(self, source: Sequence, other: Sequence) -> list[BlockCopy]:
        """`other` shares the full blocks of the prompt it has in common with `source`, gets a copy of the last one if that is not
        full, because both will write into it, and decodes from the next step on. Where there is no room for that, it waits as if
        it had been preempted."""
        full = source.num_committed_blocks
        partial = source.block_ids[full : -(-source.num_computed // source.block_size)]
        can_run = self.num_free_lanes > 0 and self.has_room(other.spec, source.num_computed, full)
        own = self.pool.allocate(len(partial)) if can_run else None
        if own is None:
            self.add(other)
            return []
        self.pool.share(source.block_ids[:full])
        other.block_ids = [*source.block_ids[:full], *own]
        other.num_committed_blocks = full
        self.join(other)
        return [BlockCopy(*pair) for pair in zip(partial, own, strict=True)]

    def finish(self, sequence: Sequence) -> None:
        """Takes the sequence out, whatever its state, and gives its blocks back: now, or when the step in flight is over."""
        if sequence.state is Seq.FINISHED or sequence in self._leaving:
            return
        if sequence.state is Seq.RUNNING and self.lanes.num_in_flight[sequence.lane]:
            self._leaving.append(sequence)
            self.lanes.retire(sequence)
            return
        if sequence.state is Seq.WAITING:
            self.waiting.remove(sequence)
            self._num_queued_tokens -= sequence.num_tokens
        elif sequence.state is Seq.RUNNING:
            self._leave(sequence)
        else:
            del self.held[sequence.spec.seq_id]
        self._release(sequence)
        sequence.advance(SeqEvent.FINISH)

    def hold(self, sequence: Sequence) -> None:
        """The prompt is computed: no more steps, but the blocks stay until `finish`."""
        self._leave(sequence)
        sequence.advance(SeqEvent.HOLD)
        self.held[sequence.spec.seq_id] = sequence

    def decode(self, sequence: Sequence) -> None:
        """Its prompt is computed and its next token drawn: it decodes from the next step on."""
        self.prefilling.remove(sequence)
        self.lanes.decode(sequence)

    def may_run_behind(self, step: Step) -> bool:
        """Whether the next step can be scheduled while `step` runs: all of it decodes, and nothing waits for a token of it."""
        return not step.slices and not self.lanes.needs_host[step.decoding.lanes].any()

    @property
    def has_leaving(self) -> bool:
        return bool(self._leaving)

    def is_leaving(self, sequence: Sequence) -> bool:
        """It has ended, while a step in flight had it."""
        return sequence in self._leaving

    def launched(self, step: Step) -> None:
        """It is in flight: who is in it keeps lane and blocks until `landed`."""
        self.lanes.num_flights += 1
        self.lanes.num_in_flight[_lanes_of(step)] += 1

    def landed(self, step: Step) -> None:
        """The step is over."""
        if not self.lanes.num_flights:  # of a runner that never leaves one in flight
            return
        self.lanes.num_flights -= 1
        self.lanes.num_in_flight[_lanes_of(step)] -= 1
        leaving, self._leaving = self._leaving, []
        for sequence in leaving:
            self.finish(sequence)

    def schedule(self, limit: int | None = None, drafts: Mapping[SeqId, Draft] | None = None) -> Step:
        """The next step, blocks allocated; prompts fill it up to `limit` tokens. Without rows when there is nothing that can run,
        or when somebody would have to give way who is in a step in flight."""
        chunk_tokens = min(self.budget.chunk_tokens, limit or self.budget.chunk_tokens)
        for sequence in sorted(self.lanes.short(), key=_order):
            if not self._make_room(sequence):
                return Step(self.lanes, self.lanes.nothing, ())
        decoding = self.lanes.runnable
        slices = self._chunks(chunk_tokens, len(decoding))
        step = Step(self.lanes, decoding, slices)
        return self._with_drafts(step, drafts, chunk_tokens) if drafts else step

    def computed(self, piece: Slice) -> None:
        """The step has written the KV of this slice; tokens drawn at its end, and drafts that were right, are the sequence's by now.
        KV of the other drafts is written over by what follows; blocks taken for nothing else are given back."""
        sequence = piece.sequence
        if not sequence.is_decoding:
            self._num_prefilled += piece.end - sequence.prefilled
            sequence.prefilled = piece.end
        if piece.drafts:
            kept = -(-sequence.num_tokens // sequence.block_size)
            self.pool.release(sequence.block_ids[kept:])
            del sequence.block_ids[kept:]
            self.lanes.put_blocks(sequence, kept)
        self.commit(sequence)

    def commit(self, sequence: Sequence) -> None:
        """Its blocks that are full and computed become shareable."""
        begin, end = sequence.num_committed_blocks, sequence.num_computed // sequence.block_size
        if end > begin:
            for block_id, name in zip(sequence.block_ids[begin:end], sequence.names(begin, end), strict=True):
                self.pool.commit(block_id, name, sequence.spec.hash_root)
            sequence.num_committed_blocks = end
        self.lanes.update(sequence)

    def _chunks(self, most_rows: int, num_rows: int) -> list[Slice]:
        """Of prompts under way and of those that wait, by turn; `num_rows` of the step decode. Who waits and has no room lets nobody else
        begin."""
        slices: list[Slice] = []
        joint_rows = min(most_rows, self.budget.saturating_rows or most_rows)
        started = self.prefilling.copy()
        can_admit = True
        while num_rows < (joint_rows if slices else most_rows):
            comes_first = not started or (bool(self.waiting) and _turn(self.waiting[0]) < _turn(started[0]))
            if can_admit and comes_first and self.waiting and self.num_free_lanes > 0:
                sequence = self.waiting[0]
                if not self._admit(sequence):
                    can_admit = False
                    continue
            elif started:
                sequence = started.pop(0)
            else:
                break
            piece = self._chunk(sequence, most_rows - num_rows)
            if slices and num_rows + piece.num_rows > joint_rows:
                break
            slices.append(piece)
            num_rows += piece.num_rows
        return slices

    def _chunk(self, sequence: Sequence, left: int) -> Slice:
        """What to compute of a prompt now; a chunk that does not finish it ends on a block boundary, so that whole blocks can ship."""
        begin, size = sequence.prefilled, min(sequence.num_missing, left)
        if size < sequence.num_missing:
            end = begin + size
            aligned = end - end % sequence.block_size
            if aligned > begin:
                size = aligned - begin
        return Slice(sequence, begin, begin + size)

    def _admit(self, sequence: Sequence) -> bool:
        """Starts the first waiting sequence if its whole prompt has room, and takes that room at once, so that prompts
        never preempt one another; what the prefix cache holds is not computed."""
        found = self.pool.match(sequence.shareable_names())
        if not self.has_room(sequence.spec, sequence.num_tokens, len(found)):
            self.pool.release(found)
            return False
        rest = self.pool.allocate(-(-sequence.num_tokens // sequence.block_size) - len(found))
        assert rest is not None
        self.waiting.pop(0)
        self._num_queued_tokens -= sequence.num_tokens
        sequence.block_ids = [*found, *rest]
        sequence.prefilled = len(found) * sequence.block_size
        sequence.num_committed_blocks = len(found)
        if sequence.times.started is None:
            sequence.num_cached = sequence.prefilled
        self._run(sequence)
        insort(self.prefilling, sequence, key=_turn)
        return True

    def _with_drafts(self, step: Step, drafts: Mapping[SeqId, Draft], chunk_tokens: int) -> Step:
        """Turns decoding sequences into slices with as much of their drafts as fits."""
        left = chunk_tokens + self.budget.max_running - step.num_rows
        decoding = {s.spec.seq_id: s for s in self.lanes.at(step.decoding.lanes)}
        verified = []
        for seq_id, draft in drafts.items():
            sequence = decoding.get(seq_id)
            if sequence is None:
                continue
            room = (len(sequence.block_ids) + self.pool.num_available) * sequence.block_size - sequence.num_tokens
            count = min(len(draft.token_ids), sequence.num_left - 1, room, left)
            if count > 0 and self._grow(sequence, sequence.num_tokens + count):
                verified.append(Slice(sequence, sequence.num_tokens - 1, sequence.num_tokens, draft.token_ids[:count]))
                left -= count
        alone = ~np.isin(step.decoding.lanes, [piece.sequence.lane for piece in verified])
        return Step(self.lanes, step.decoding.where(alone), [*verified, *step.slices])

    def _make_room(self, sequence: Sequence) -> bool:
        """Gets the block for its newest token, if it must by preempting others, or itself. False where a step in flight forbids that."""
        num_tokens = sequence.num_tokens + int(self.lanes.num_in_flight[sequence.lane]) if sequence.state is Seq.RUNNING else 0
        while sequence.state is Seq.RUNNING and not self._grow(sequence, num_tokens):
            if self.lanes.num_flights:
                return False
            # The newest of the lowest class. Never a prompt for another worker: the hand-off reads its blocks.
            victim = next(s for s in reversed(self.running) if s is sequence or s.spec.purpose is Purpose.GENERATE)
            self._preempt(victim)
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        had = len(sequence.block_ids)
        blocks = self.pool.allocate(max(0, -(-num_tokens // sequence.block_size) - had))
        if blocks is None:
            return False
        sequence.block_ids.extend(blocks)
        self.lanes.put_blocks(sequence, had)
        return True

    def _run(self, sequence: Sequence) -> None:
        sequence.advance(SeqEvent.ADMIT)
        insort(self.running, sequence, key=_order)
        self.lanes.take(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if not sequence.is_decoding:
            self.prefilling.remove(sequence)
        self.lanes.leave(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._release(sequence)
        sequence.advance(SeqEvent.PREEMPT)
        self.num_preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.prefilled = 0
        sequence.num_committed_blocks = 0


def _lanes_of(step: Step) -> Ints:
    if not step.slices:
        return step.decoding.lanes
    return np.array([*step.decoding.lanes.tolist(), *(piece.sequence.lane for piece in step.slices)])


def _order(sequence: Sequence) -> tuple[int, int]:
    """Higher class first, then older first."""
    return (-sequence.spec.priority, sequence.arrival)


def _turn(sequence: Sequence) -> tuple[int, int, int]:
    """Higher class first, then those with least to compute."""
    assert sequence.turn is not None
    return (-sequence.spec.priority, sequence.turn, sequence.arrival)
