"""The engine's side of speculation: asks for drafts before a step, tells what became of them after it. Engine thread; the counts
may be read from anywhere, under the engine's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from splitfire.engine.drafting import Draft, Speculator, Verified
from splitfire.engine.sequence import SeqId, Sequence
from splitfire.engine.updates import DraftCounts, SequenceUpdate, StepResult


class Proposals:
    """Drafts of one step at a time. Does nothing without a speculator."""

    def __init__(self, speculator: Speculator | None) -> None:
        self._speculator = speculator
        self._drafts: Mapping[SeqId, Draft] = {}
        self._decoding: frozenset[SeqId] = frozenset()
        self._counts: dict[str, DraftCounts] = {}

    @property
    def is_on(self) -> bool:
        return self._speculator is not None

    def can_skip(self, num_decoding: int) -> bool:
        """Whether the next step for so many sequences would have no drafts whatever their newest tokens are."""
        return self._speculator is None or self._speculator.can_skip(num_decoding)

    def skip(self, num_decoding: int) -> None:
        """A step that nobody was asked about."""
        if self._speculator is not None:
            self._speculator.skip(num_decoding)

    def ask(self, decoding: Seq[Sequence], room: int) -> Mapping[SeqId, Draft]:
        """For the next step, in which at most these decode."""
        if self._speculator is None or not decoding:
            return {}
        self._decoding = frozenset(s.spec.seq_id for s in decoding)
        self._drafts = _allowed(decoding, self._speculator.propose(decoding, room))
        return self._drafts

    def count(self, updates: Seq[SequenceUpdate]) -> None:
        """Under the engine's lock."""
        for update in updates:
            if update.num_drafted:
                counts = self._counts.setdefault(self._drafts[update.seq_id].source, DraftCounts())
                counts.num_drafted += update.num_drafted
                counts.num_accepted += update.num_accepted

    def counts(self) -> dict[str, DraftCounts]:
        """By drafter. Under the engine's lock."""
        return {source: replace(counts) for source, counts in self._counts.items()}

    def tell(self, result: StepResult) -> None:
        """What became of the step, and who has ended in it."""
        if self._speculator is None:
            return
        plain = zip(result.plain.seq_ids, result.plain.token_ids, strict=True)
        verified = [Verified(seq_id, None, 0, (token_id,)) for seq_id, token_id in plain]
        verified += [self._verified(u) for u in result.events if u.tokens and u.seq_id in self._decoding]
        self._speculator.verified(verified, result.num_rows, result.duration_s)
        for update in result.events:
            if update.is_finished:
                self._speculator.forget(update.seq_id)

    def forget(self, seq_id: SeqId) -> None:
        if self._speculator is not None:
            self._speculator.forget(seq_id)

    def _verified(self, update: SequenceUpdate) -> Verified:
        draft = None
        if update.num_drafted:
            whole = self._drafts[update.seq_id]
            draft = replace(whole, token_ids=whole.token_ids[: update.num_drafted])
        return Verified(update.seq_id, draft, update.num_accepted, tuple(token.token_id for token in update.tokens))


def _allowed(decoding: Seq[Sequence], drafts: Mapping[SeqId, Draft]) -> Mapping[SeqId, Draft]:
    """Each draft as far as its sequence's grammar goes: what cannot be drawn need not be verified."""
    held = [s for s in decoding if s.constraint is not None and s.spec.seq_id in drafts] if drafts else []
    cut = {}
    for sequence in held:
        draft = drafts[sequence.spec.seq_id]
        assert sequence.constraint is not None
        cut[sequence.spec.seq_id] = replace(draft, token_ids=draft.token_ids[: sequence.constraint.num_valid(draft.token_ids)])
    return {**drafts, **cut} if cut else drafts
