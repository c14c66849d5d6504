"""Which sequences compute how many tokens in the next step. Pure: no tensors, no clock, no threads.

One rule serves both roles: every sequence that decodes goes first (one token each), then prompts share what is left of the
token budget in chunks. Drafts come last: they fill the step up to `chunk_tokens + max_running` rows, so that they take nothing
from prompts and always have as many rows as there may be sequences, and they never make anybody give way: a draft is cut to the
blocks that are there, and to what the sequence may still get. What it does not need after all goes back after the step.
A sequence that needs a block when none is left makes room by preempting the newest of the lowest
class; a preempted sequence gives all its blocks back and computes again later, its tokens kept. The oldest of the
highest class is never preempted, so there is always progress.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from splitfire.core.lifecycle import Seq, SeqEvent
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drafting import Draft
from splitfire.engine.sequence import Purpose, SeqId, Sequence


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one step. Prompts get what decoding sequences leave of `chunk_tokens`; with drafts a step has at most
    `chunk_tokens + max_running` rows."""

    chunk_tokens: int
    max_running: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens [begin, end) of one sequence, computed in this step, and `drafts` that may follow them. `samples` when they reach
    its end: then there is a token to draw after the last of them and after each draft."""

    sequence: Sequence
    begin: int
    end: int
    decodes: bool = False  # the newest token alone; only these have drafts
    drafts: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.end - self.begin + len(self.drafts)

    @property
    def samples(self) -> bool:
        return self.end == self.sequence.num_tokens


class Scheduler:
    """Owns which sequences wait, run and are held. Used under the engine's lock."""

    def __init__(self, pool: BlockPool, budget: Budget) -> None:
        self.pool = pool
        self.budget = budget
        self.waiting: list[Sequence] = []  # ordered by (class, arrival)
        self.running: list[Sequence] = []  # ordered by (class, arrival)
        self.held: dict[SeqId, Sequence] = {}
        self.num_preemptions = 0

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens not computed yet, queued or running."""
        return sum(s.num_missing for s in (*self.waiting, *self.running) if not s.is_decoding)

    def add(self, sequence: Sequence) -> None:
        _insert(self.waiting, sequence)

    def join(self, sequence: Sequence) -> None:
        """A sequence whose blocks arrived from elsewhere; it enters the running batch at once."""
        sequence.advance(SeqEvent.ADMIT)
        _insert(self.running, sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes the sequence out, whatever its state, and gives its blocks back."""
        if sequence.state is Seq.FINISHED:
            return
        if sequence.state is Seq.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is Seq.RUNNING:
            self.running.remove(sequence)
        else:
            del self.held[sequence.spec.seq_id]
        self._release(sequence)
        sequence.advance(SeqEvent.FINISH)

    def hold(self, sequence: Sequence) -> None:
        """The prompt is computed: no more steps, but the blocks stay until `finish`."""
        self.running.remove(sequence)
        sequence.advance(SeqEvent.HOLD)
        self.held[sequence.spec.seq_id] = sequence

    def schedule(self, limit: int | None = None, drafts: Mapping[SeqId, Draft] | None = None) -> list[Slice]:
        """The next step, blocks allocated; prompts fill it up to `limit` tokens. Empty when there is nothing that can run."""
        slices: dict[SeqId, Slice] = {}
        left = min(self.budget.chunk_tokens, limit or self.budget.chunk_tokens)
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):
            if sequence.state is not Seq.RUNNING or (left == 0 and not sequence.is_decoding):
                continue  # preempted to make room for one before it, or a prompt that has to wait
            decodes = sequence.is_decoding
            end = sequence.num_computed + (1 if decodes else self._chunk(sequence, left))
            if not self._make_room(sequence, end, slices):
                continue
            slices[sequence.spec.seq_id] = Slice(sequence, sequence.num_computed, end, decodes)
            left = max(0, left - (end - sequence.num_computed))
        while left and self.waiting and len(self.running) < self.budget.max_running:
            admitted = self._admit(self.waiting[0], left)
            if admitted is None:
                break
            slices[admitted.sequence.spec.seq_id] = admitted
            left -= admitted.end - admitted.begin
        if drafts:
            self._add_drafts(slices, drafts, min(self.budget.chunk_tokens, limit or self.budget.chunk_tokens))
        return list(slices.values())

    def computed(self, piece: Slice, num_accepted: int = 0) -> None:
        """The step has written the KV of this slice and of the first `num_accepted` drafts, which are tokens by now: full blocks
        become shareable. KV of the other drafts is written over by what follows; blocks taken for nothing else are given back."""
        sequence = piece.sequence
        sequence.num_computed = piece.end + num_accepted
        full = sequence.num_computed // sequence.block_size
        for block in range(sequence.num_committed_blocks, full):
            self.pool.commit(sequence.block_ids[block], sequence.name_of(block))
        sequence.num_committed_blocks = max(sequence.num_committed_blocks, full)
        if piece.drafts:
            kept = -(-sequence.num_tokens // sequence.block_size)
            self.pool.release(sequence.block_ids[kept:])
            del sequence.block_ids[kept:]

    def _add_drafts(self, slices: dict[SeqId, Slice], drafts: Mapping[SeqId, Draft], chunk_tokens: int) -> None:
        """Appends to the slices of decoding sequences as much of their drafts as fits."""
        left = chunk_tokens + self.budget.max_running - sum(piece.num_rows for piece in slices.values())
        for seq_id, draft in drafts.items():
            piece = slices.get(seq_id)
            if piece is None or not piece.decodes:
                continue
            sequence = piece.sequence
            room = (len(sequence.block_ids) + self.pool.num_available) * sequence.block_size - piece.end
            count = min(len(draft.token_ids), sequence.num_left - 1, room, left)
            if count > 0 and self._grow(sequence, piece.end + count):
                slices[seq_id] = replace(piece, drafts=draft.token_ids[:count])
                left -= count

    def _chunk(self, sequence: Sequence, left: int) -> int:
        """Tokens to compute now; a chunk that does not finish ends on a block boundary, so that whole blocks can ship."""
        size = min(sequence.num_missing, left)
        if size < sequence.num_missing:
            end = sequence.num_computed + size
            aligned = end - end % sequence.block_size
            if aligned > sequence.num_computed:
                size = aligned - sequence.num_computed
        return size

    def _admit(self, sequence: Sequence, left: int) -> Slice | None:
        """Starts the first waiting sequence if its whole prompt has room, and takes that room at once, so that prompts
        never preempt one another; what the prefix cache holds is not computed."""
        found = self.pool.match(sequence.shareable_names())
        sequence.block_ids = found
        sequence.num_computed = len(found) * sequence.block_size
        sequence.num_committed_blocks = len(found)
        if not self._grow(sequence, sequence.num_tokens):
            self._release(sequence)
            return None
        if sequence.times.started is None:
            sequence.num_cached = sequence.num_computed
        self.waiting.pop(0)
        sequence.advance(SeqEvent.ADMIT)
        _insert(self.running, sequence)
        return Slice(sequence, sequence.num_computed, sequence.num_computed + self._chunk(sequence, left))

    def _make_room(self, sequence: Sequence, end: int, slices: dict[SeqId, Slice]) -> bool:
        """Gets the blocks for tokens up to `end`; False when `sequence` itself had to give way."""
        while not self._grow(sequence, end):
            # The newest of the lowest class. Never a prompt for another worker: the hand-off reads its blocks.
            victim = next(s for s in reversed(self.running) if s is sequence or s.spec.purpose is Purpose.GENERATE)
            slices.pop(victim.spec.seq_id, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, end: int) -> bool:
        blocks = self.pool.allocate(sequence.blocks_needed(end))
        if blocks is None:
            return False
        sequence.block_ids.extend(blocks)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.advance(SeqEvent.PREEMPT)
        self.num_preemptions += 1
        _insert(self.waiting, sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        sequence.num_committed_blocks = 0


def _insert(queue: list[Sequence], sequence: Sequence) -> None:
    """Keeps `queue` ordered: higher class first, then older first."""
    key = (-sequence.spec.priority, sequence.arrival)
    at = len(queue)
    while at and (-queue[at - 1].spec.priority, queue[at - 1].arrival) > key:
        at -= 1
    queue.insert(at, sequence)
