"""A small model that drafts: it runs beside the target, over KV of its own, and draws with the same noise. Engine thread only.

Each sequence it follows has a mirror here: a sequence of the same tokens and sampling, and blocks of the draft pool. Before
each use the mirror is brought in step: drafts that were right stay and keep their KV, what was not is cut off and written over.
Preemption and resume need nothing else, and after a hand-off the prompt's KV is computed here, in chunks, beside the target's
steps. A sequence that the pool has no room for is not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from splitfire.engine.blocks import BlockPool
from splitfire.engine.lanes import Lanes
from splitfire.engine.runner import StepRunner
from splitfire.engine.scheduler import Slice, Step
from splitfire.engine.sequence import Purpose, SeqId, Sequence

MAX_BEHIND = 16  # tokens without KV that a first drafting step computes along


class DraftModel:
    """Owns the mirrors, a lane for each of at most `max_mirrors`, and the draft pool. Invariant: a mirror's first `num_sure` tokens
    are the target's."""

    def __init__(self, runner: StepRunner, blocks: BlockPool, max_context: int, max_mirrors: int) -> None:
        self.runner = runner
        self.blocks = blocks
        self._max_context = max_context
        self._lanes = Lanes(max_mirrors, runner.pool.layout.block_size)
        self._mirrors: dict[SeqId, _Mirror] = {}
        self._num_ended = 0  # mirrors: after each there may be room for one that had none

    @property
    def num_mirrors(self) -> int:
        return len(self._mirrors)

    def num_missing(self, target: Sequence) -> int:
        """Tokens to compute before drafts can be made; 0: now."""
        mirror = self._mirrors.get(target.spec.seq_id)
        missing = target.num_tokens if mirror is None else mirror.follow(target)
        return missing if missing > MAX_BEHIND else 0

    def catch_up(self, targets: Seq[Sequence], num_tokens: int) -> None:
        """Computes at most `num_tokens` of what is missing, in the order of `targets`."""
        slices: list[Slice] = []
        for mirror, target in zip(self._take(targets), targets, strict=True):
            size = min(mirror.follow(target) - 1, num_tokens) if mirror is not None else 0
            if mirror is not None and size > 0 and self._grow(mirror, mirror.sequence.prefilled + size):
                sequence = mirror.sequence
                slices.append(Slice(sequence, sequence.prefilled, sequence.prefilled + size))
                num_tokens -= size
        if slices:
            self.runner.run(Step(self._lanes, self._lanes.decoding, slices))
            for piece in slices:
                piece.sequence.prefilled = piece.end

    def draft(self, targets: Seq[Sequence], widths: Mapping[SeqId, int]) -> dict[SeqId, tuple[int, ...]]:
        """As many tokens as `widths` says, or fewer, for targets that miss none: one step of the model a token."""
        mirrors = [mirror for mirror in self._take(targets) if mirror is not None]
        followed = {mirror.seq_id: mirror for mirror in mirrors}
        for target in targets:
            if target.spec.seq_id in followed:
                followed[target.spec.seq_id].follow(target)
        drafting, depth = mirrors, 0
        while drafting := [m for m in drafting if depth < widths[m.seq_id] and self._can_go_on(m)]:
            depth += 1
            slices = [Slice(m.sequence, m.sequence.prefilled, m.sequence.num_tokens) for m in drafting]
            drawn = self.runner.run(Step(self._lanes, self._lanes.decoding, slices)).slices
            for i, (mirror, piece) in enumerate(zip(drafting, slices, strict=True)):
                mirror.take(piece, drawn[i].tokens[0].token_id if drawn[i].tokens else None)
        return {mirror.seq_id: mirror.drafted for mirror in mirrors if mirror.drafted}

    def forget(self, seq_id: SeqId) -> None:
        mirror = self._mirrors.pop(seq_id, None)
        if mirror is not None:
            self.blocks.release(mirror.sequence.block_ids)
            self._lanes.leave(mirror.sequence)
            self._num_ended += 1

    def _can_go_on(self, mirror: _Mirror) -> bool:
        """There is room for another token, and the last one did not end the answer."""
        sequence = mirror.sequence
        if mirror.has_failed or (mirror.drafted and sequence.tokens[-1] in sequence.spec.stopping.stop_token_ids):
            return False
        return self._grow(mirror, sequence.num_tokens)

    def _take(self, targets: Seq[Sequence]) -> list[_Mirror | None]:
        """The mirrors of targets; None for which there is no lane."""
        for target in targets:
            if target.spec.seq_id not in self._mirrors and self._lanes.num_free:
                mirror = self._mirrors[target.spec.seq_id] = _Mirror(target)
                self._lanes.take(mirror.sequence)
        return [self._mirrors.get(target.spec.seq_id) for target in targets]

    def _grow(self, mirror: _Mirror, num_tokens: int) -> bool:
        """Blocks for KV of so many tokens. Without them it holds none, until another mirror has ended."""
        if num_tokens > self._max_context or mirror.gave_up_at == self._num_ended:
            return False
        sequence = mirror.sequence
        had = len(sequence.block_ids)
        blocks = self.blocks.allocate(max(0, self.runner.pool.layout.blocks_for(num_tokens) - had))
        if blocks is None:
            self.blocks.release(sequence.block_ids)
            sequence.block_ids, sequence.prefilled = [], 0
            mirror.gave_up_at = self._num_ended
            return False
        sequence.block_ids.extend(blocks)
        self._lanes.put_blocks(sequence, had)
        return True


class _Mirror:
    """One target's tokens here, drafts at their end."""

    def __init__(self, target: Sequence) -> None:
        spec = target.spec
        quiet = replace(spec.sampling, logprobs=None)
        # A grammar is asked once, about the whole draft, by the engine.
        plain = replace(spec, sampling=quiet, purpose=Purpose.GENERATE, block_hashes=(), grammar=None, forks=())
        self.sequence = Sequence(plain, 0, target.block_size)
        self.num_sure = self.sequence.num_tokens
        self.has_failed = False  # its logits were not finite: whatever it drafts would be as bad
        self.gave_up_at: int | None = None

    @property
    def seq_id(self) -> SeqId:
        return self.sequence.spec.seq_id

    @property
    def drafted(self) -> tuple[int, ...]:
        return tuple(self.sequence.tokens[self.num_sure :])

    def follow(self, target: Sequence) -> int:
        """Brings the tokens in step; how many of them have no KV."""
        mine, theirs = self.sequence.tokens, target.tokens
        at = self.num_sure
        end = min(len(mine), len(theirs))
        while at < end and mine[at] == theirs[at]:
            at += 1
        if at < len(mine) or at < len(theirs):
            mine[at:] = theirs[at:]
            # The last token is computed again where its KV is there, when drafts were never verified: a draw needs its logits.
            self.sequence.prefilled = min(self.sequence.prefilled, at, len(mine) - 1)
        self.num_sure = len(theirs)
        return self.sequence.num_missing

    def take(self, piece: Slice, token_id: int | None) -> None:
        self.sequence.prefilled = piece.end
        if token_id is None:
            self.has_failed = True
        else:
            self.sequence.tokens.append(token_id)
