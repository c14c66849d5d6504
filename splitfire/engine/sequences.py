"""The sequences of an engine by their ids, and what each step makes of them. Engine thread; all of it under the engine's lock.

A sequence that is several choices is one as far as the prompt goes, known by its own id and by theirs. With the first tokens it
becomes the first choice that goes on; the others are forked from it, and from then on nothing binds them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from splitfire.engine.blocks import BlockCopy
from splitfire.engine.drawing import Drawn, StepTokens
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.lanes import Decoding
from splitfire.engine.lending import Reservation
from splitfire.engine.pool import KvPool
from splitfire.engine.scheduler import Scheduler, Slice, Step, newest
from splitfire.engine.sequence import Fork, Purpose, SeqId, Sequence, SequenceSpec
from splitfire.engine.updates import PlainTokens, SequenceUpdate


class Sequences:
    """From `add` or `join` to the end of each."""

    def __init__(self, scheduler: Scheduler, pool: KvPool) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._by_id: dict[SeqId, Sequence] = {}
        self._unforked: dict[SeqId, Sequence] = {}  # by the ids of choices that are still one
        self._arrivals = 0

    def get(self, seq_id: SeqId) -> Sequence | None:
        return self._by_id.get(seq_id)

    def add(self, spec: SequenceSpec) -> None:
        """One whose prompt is to be computed here."""
        sequence = self._new(spec)
        self._unforked.update((fork.seq_id, sequence) for fork in spec.forks)
        self._scheduler.add(sequence)

    def join(self, reservation: Reservation, first_tokens: Mapping[SeqId, int]) -> None:
        """One whose prompt's KV is here; those of its choices that have a first token go on."""
        spec = reservation.spec
        first, *others = (fork for fork in spec.choices if fork.seq_id in first_tokens)
        sequence = self._new(spec.alone(first))
        sequence.num_cached = reservation.num_pinned * sequence.block_size
        sequence.tokens.append(first_tokens[first.seq_id])
        if sequence.constraint is not None:
            sequence.constraint.advance(first_tokens[first.seq_id])
        sequence.block_ids = reservation.block_ids
        sequence.num_committed_blocks = spec.num_tokens // sequence.block_size
        for block_id in reservation.block_ids[sequence.num_committed_blocks :]:
            self._scheduler.pool.begin_filling(block_id)
        self._scheduler.num_reserved -= reservation.num_lanes
        self._scheduler.num_reserved_blocks -= len(reservation.block_ids)
        self._scheduler.join(sequence)
        self._fork(sequence, {fork: first_tokens[fork.seq_id] for fork in others})

    def finish(self, seq_id: SeqId) -> None:
        """Ends a sequence, or one choice of several before they are forked. Unknown ids are ones that finished already."""
        together = self._unforked.pop(seq_id, None)
        if together is not None:
            together.forks = [fork for fork in together.forks if fork.seq_id != seq_id]
            if together.forks:
                return
            seq_id = together.spec.seq_id
        sequence = self._by_id.get(seq_id)
        if sequence is not None:
            self._end(sequence)

    def update(self, step: Step, drawn: StepTokens, now: float) -> tuple[PlainTokens, list[SequenceUpdate]]:
        """Takes in what a step came to. Nothing is told of who ended while it was in flight."""
        events: list[SequenceUpdate] = []
        decoding, drawn = self._of_those_here(step, drawn)
        here = [not self._scheduler.is_leaving(piece.sequence) for piece in step.slices]
        self._scheduler.landed(step)
        plain = self._update_decoding(decoding, drawn, events, now)
        for i, piece in enumerate(step.slices):
            one = drawn.slices.get(i)
            if not here[i]:
                continue
            if one is not None and piece.sequence.forks:
                events += self._update_choices(piece, one, now)
            else:
                events.append(self._update(piece, one, now))
        return plain, events

    def _of_those_here(self, step: Step, drawn: StepTokens) -> tuple[Decoding, StepTokens]:
        if not self._scheduler.has_leaving:
            return step.decoding, drawn
        is_leaving = self._scheduler.lanes.is_leaving(step.decoding.lanes)
        keeps = ~is_leaving
        places = keeps.cumsum() - 1
        others = {int(places[i]): one for i, one in drawn.others.items() if keeps[i]}
        return step.decoding.where(keeps), StepTokens(drawn.token_ids[keeps], others, drawn.slices)

    # -- what decodes

    def _update_decoding(self, decoding: Decoding, drawn: StepTokens, events: list[SequenceUpdate], now: float) -> PlainTokens:
        """One more token for each; those that end with it, or get more than a token, are told in `events`."""
        lanes, token_ids = self._scheduler.lanes, drawn.token_ids
        if drawn.others:
            is_plain = np.ones(len(decoding), np.bool_)
            is_plain[list(drawn.others)] = False
            for i, sequence in zip(sorted(drawn.others), lanes.at(decoding.lanes[~is_plain]), strict=True):
                events.append(self._update(newest(sequence), drawn.others[i], now))
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

    # -- slices

    def _update(self, piece: Slice, drawn: Drawn | None, now: float) -> SequenceUpdate:
        """Appends the drawn tokens and moves the sequence on."""
        sequence, spec = piece.sequence, piece.sequence.spec
        offset = sequence.num_output
        for_shipping = spec.purpose is Purpose.PREFILL
        block_ids = tuple(sequence.block_ids) if for_shipping else ()
        if drawn is None:
            self._scheduler.computed(piece)
            return SequenceUpdate(spec.seq_id, sequence.num_computed, block_ids, offset)
        if not drawn.tokens:
            self._fail(sequence)
            return SequenceUpdate(spec.seq_id, 0, (), offset, is_finished=True, error=drawn.error)
        is_first = offset == len(spec.output)
        if is_first:
            sequence.times.prompt_done = now
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

    def _fail(self, sequence: Sequence) -> None:
        """What is not finite is shared with nobody: whoever asks the same again would fail of the same KV."""
        self._scheduler.pool.forget(sequence.block_ids)
        self._end(sequence)

    # -- several choices

    def _update_choices(self, piece: Slice, drawn: Drawn, now: float) -> list[SequenceUpdate]:
        """Their prompt is computed: each gets its first token and, unless that ends it, goes on by itself, or (PREFILL) is held with
        the others. A PREFILL sequence tells of all of them in one update."""
        sequence, spec = piece.sequence, piece.sequence.spec
        is_prefill = spec.purpose is Purpose.PREFILL
        block_ids = tuple(sequence.block_ids) if is_prefill else ()
        if drawn.error:
            names = [spec.seq_id] if is_prefill else [fork.seq_id for fork in sequence.forks]
            self._fail(sequence)
            return [SequenceUpdate(n, 0, (), len(spec.output), is_finished=True, error=drawn.error) for n in names]
        sequence.times.prompt_done = now
        self._scheduler.computed(piece)
        pairs = [*zip(sequence.forks, drawn.forks, strict=True)]
        updates = tuple(self._first(sequence, fork, one) for fork, one in pairs)
        going_on = {fork: one.tokens[0].token_id for (fork, one), u in zip(pairs, updates, strict=True) if not u.is_finished}
        if not going_on:
            self._end(sequence)
        elif is_prefill:
            self._scheduler.hold(sequence)
        else:
            self._split(sequence, going_on)
        if not is_prefill:
            return [*updates]
        return [SequenceUpdate(spec.seq_id, piece.end, block_ids, len(spec.output), is_finished=not going_on, forks=updates)]

    def _first(self, sequence: Sequence, fork: Fork, drawn: Drawn) -> SequenceUpdate:
        """A choice's first token, or why there is none."""
        stopping = sequence.spec.stopping
        stopped = any(token.token_id in stopping.stop_token_ids for token in drawn.tokens)
        return SequenceUpdate(
            fork.seq_id,
            sequence.num_computed,
            (),
            sequence.num_output,
            tokens=drawn.tokens,
            is_finished=stopped or sequence.num_left <= 1 or bool(drawn.error),
            stopped=stopped,
            error=drawn.error,
            num_cached=sequence.num_cached,
            times=sequence.times,
        )

    def _split(self, sequence: Sequence, going_on: Mapping[Fork, int]) -> None:
        """It becomes the first of these, the others are forked from it."""
        (first, token), *others = going_on.items()
        self._drop(sequence)
        sequence.become(first, token)
        self._by_id[first.seq_id] = sequence
        self._scheduler.decode(sequence)
        self._fork(sequence, dict(others))

    def _fork(self, sequence: Sequence, first_tokens: Mapping[Fork, int]) -> None:
        copies: list[BlockCopy] = []
        for fork, token in first_tokens.items():
            other = self._by_id[fork.seq_id] = sequence.fork(fork, token, self._next_arrival())
            copies += self._scheduler.fork(sequence, other)
        self._pool.copy(copies)

    # -- the books

    def _new(self, spec: SequenceSpec) -> Sequence:
        sequence = self._by_id[spec.seq_id] = Sequence(spec, self._next_arrival(), self._pool.layout.block_size)
        return sequence

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _drop(self, sequence: Sequence) -> None:
        """By all its names."""
        del self._by_id[sequence.spec.seq_id]
        for fork in sequence.spec.forks:
            self._unforked.pop(fork.seq_id, None)

    def _end(self, sequence: Sequence) -> None:
        self._drop(sequence)
        self._scheduler.finish(sequence)
