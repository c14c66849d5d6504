"""The speculator: asks every sequence's drafters what they could propose, and the controller how much of it is worth a row.

Life of a draft here:
 1. `propose` shows each drafter the tokens that came since the last step. Drafters that follow a text thereby learn whether
    they would have been right, drafted or not.
 2. Each tells the survival of its next tokens; the better one of a sequence becomes its offer.
 3. The controller takes from the offers what pays; the draft model runs for those it was chosen for.
 4. `verified` books what the step brought and what it took.

Engine thread only. Where nothing can pay, nothing is looked at; an index that fell behind catches up in bulk, a piece a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from splitfire.engine.drafting import Draft, Verified
from splitfire.engine.sequence import SeqId, Sequence
from splitfire.engine.speculation.acceptance import Acceptance, Shares
from splitfire.engine.speculation.controller import Controller, Offer
from splitfire.engine.speculation.lookup import Lookup
from splitfire.engine.speculation.modelled import Modelled
from splitfire.engine.speculation.predicted import Predicted

CATCH_UP_TOKENS = 4096  # that one step takes into indexes at most: a millisecond


Drafters = tuple[Lookup | Predicted, ...]
QUIET_STEPS = (
    16  # without anything to propose, after each of which a sequence is looked at less often, and after the first all of them
)
LONGEST_NAP = 4  # steps


@dataclass(frozen=True, slots=True)
class Sources:
    """Which drafters are used."""

    lookup: bool = True
    predicted: bool = True


class BatchSpeculator:
    """Owns every sequence's drafters. Implements drafting.Speculator."""

    def __init__(
        self,
        controller: Controller,
        clock: Callable[[], float],
        sources: Sources = Sources(),
        modelled: Modelled | None = None,
    ) -> None:
        self.controller = controller
        self.shares = {Lookup.source: Shares(), Predicted.source: Shares()}
        self._clock = clock
        self._sources = sources
        self._modelled = modelled
        self._followed: dict[SeqId, _Followed] = {}
        self._offered: dict[SeqId, Lookup | Predicted] = {}  # in the step under way
        self._proposing_s = 0.0
        self._num_quiet = 0  # steps without an offer
        self._num_sequences = 0  # in the last step

    @property
    def _is_napping(self) -> bool:
        return _naps(self._num_quiet)

    @property
    def num_followed(self) -> int:
        return len(self._followed)

    def can_skip(self, num_decoding: int) -> bool:
        is_alike = num_decoding == self._num_sequences
        return (is_alike and _naps(self._num_quiet + 1)) or not self.controller.is_worthwhile(num_decoding)

    def skip(self, num_decoding: int) -> None:
        self._proposing_s = 0.0
        quiet = self._num_quiet + 1  # who is new is looked at within LONGEST_NAP steps
        self._num_quiet = quiet if num_decoding == self._num_sequences else min(quiet, QUIET_STEPS)
        self._num_sequences = num_decoding

    def propose(self, decoding: Seq[Sequence], room: int) -> Mapping[SeqId, Draft]:
        controller, num_sequences = self.controller, len(decoding)
        self.skip(num_sequences)
        if self._is_napping or not controller.is_worthwhile(num_sequences):
            return {}
        began = self._clock()
        offers = self._offers(decoding, controller.least_survival(num_sequences))
        modelled = self._modelled.offers(decoding) if self._modelled is not None else ()
        drafts: dict[SeqId, Draft] = {}
        if offers or modelled:
            self._num_quiet = 0
            picks = controller.choose(num_sequences, offers, modelled, room)
            for seq_id, pick in picks.items():
                if pick.source != Modelled.source:
                    drafts[seq_id] = Draft(self._offered[seq_id].draft(pick.width), pick.source)
            if self._modelled is not None:
                drafts |= self._modelled.draft(decoding, picks)
        self._proposing_s = self._clock() - began
        return drafts

    def verified(self, results: Seq[Verified], num_rows: int, duration_s: float) -> None:
        if self._is_napping:  # nothing was drafted, and what a plain step takes is known
            return
        num_extra = 0
        for result in results:
            if result.draft is None:
                continue
            num_drafted = len(result.draft.token_ids)
            num_extra += num_drafted
            if result.draft.source == Modelled.source:
                assert self._modelled is not None
                self._modelled.verified(result.seq_id, num_drafted, result.num_accepted)
            else:
                self._offered[result.seq_id].verified(num_drafted, result.num_accepted)
        if results and num_rows == len(results) + num_extra:  # no prompt was computed beside them
            num_tokens = sum(len(result.token_ids) for result in results)
            step_s = max(0.0, duration_s - self._proposing_s)
            self.controller.observe(len(results), num_extra, num_tokens, step_s, self._proposing_s)

    def forget(self, seq_id: SeqId) -> None:
        self._followed.pop(seq_id, None)
        if self._modelled is not None:
            self._modelled.forget(seq_id)

    def _offers(self, decoding: Seq[Sequence], least: float) -> list[Offer]:
        budget = CATCH_UP_TOKENS
        offers: list[Offer] = []
        none: list[float] = []
        self._offered.clear()
        for sequence in decoding:
            seq_id = sequence.spec.seq_id
            followed = self._followed.get(seq_id)
            if followed is None:
                followed = self._followed[seq_id] = _Followed(self._begin(sequence))
            tokens, best = sequence.tokens, none
            if len(tokens) < followed.wakes_at:
                continue
            for drafter in followed.drafters:
                if behind := len(tokens) - drafter.num_seen:
                    if behind > 1:
                        behind = min(behind, budget)
                        budget -= behind
                    drafter.follow(tokens, behind)
                if not (width := drafter.look()):
                    continue
                width = min(width, sequence.num_left - 1)
                survival = drafter.acceptance.survival(drafter.evidence, width, least)
                if sum(survival) > sum(best):
                    best, self._offered[seq_id] = survival, drafter
            if best:
                offers.append(Offer(seq_id, self._offered[seq_id].source, best))
                followed.num_quiet = 0
            elif budget:
                followed.num_quiet += 1
                followed.wakes_at = len(tokens) + min(1 + followed.num_quiet // QUIET_STEPS, LONGEST_NAP)
        return offers

    def _begin(self, sequence: Sequence) -> Drafters:
        drafters: list[Lookup | Predicted] = []
        if self._sources.lookup:
            drafters.append(Lookup(Acceptance(self.shares[Lookup.source])))
        if self._sources.predicted and sequence.spec.predicted:
            acceptance = Acceptance(self.shares[Predicted.source])
            drafters.append(Predicted(sequence.spec.predicted, len(sequence.spec.prompt), acceptance))
        return tuple(drafters)


def _naps(num_quiet: int) -> bool:
    """Whether nobody is asked in the step after so many quiet ones."""
    return num_quiet > QUIET_STEPS and num_quiet % LONGEST_NAP != 0


class _Followed:
    """One sequence's drafters. One that has had nothing to propose for long is looked at every few steps only."""

    __slots__ = ("drafters", "num_quiet", "wakes_at")

    def __init__(self, drafters: Drafters) -> None:
        self.drafters = drafters
        self.num_quiet = 0  # looks without an offer
        self.wakes_at = 0  # tokens of the sequence
