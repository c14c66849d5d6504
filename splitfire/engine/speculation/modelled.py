"""When the draft model is used, and for whom: its shares, its catching up, and when to try again. Engine thread only.

Unlike a text, the model costs time before anything is known. What it is known to be worth therefore fades back to the prior
while it is not used, slowly enough that trying again costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from splitfire.engine.drafting import Draft
from splitfire.engine.sequence import SeqId, Sequence
from splitfire.engine.speculation.acceptance import NUM_BINS, Acceptance, Shares
from splitfire.engine.speculation.controller import DEPTHS, Controller, Offer, Pick
from splitfire.engine.speculation.draft_model import DraftModel

PRIOR = (0.35,) * NUM_BINS  # misses, by place in the draft
FADE_STEPS = 256  # without a draft, after which half of what is known is forgotten
CATCH_UP_SHARE = 0.25  # of the time that is left to a sequence, that computing its prompt here may take
MOST_OF_A_STEP = 0.5  # that catching up may add to each


class Modelled:
    """The draft model's side of the speculator."""

    source = "model"

    def __init__(self, model: DraftModel, controller: Controller) -> None:
        self.shares = Shares(PRIOR)
        self._model = model
        self._controller = controller
        self._acceptances: dict[SeqId, Acceptance] = {}
        self._num_unused = 0  # steps

    def offers(self, decoding: Seq[Sequence]) -> list[Offer]:
        """Of the sequences it is in step with. Brings others in step where that pays."""
        self._num_unused += 1
        if self._num_unused % FADE_STEPS == 0:
            self._fade()
        num_sequences, costs = len(decoding), self._controller.costs
        tokens_per_s = 64 / max(costs.draft(64), 1e-9)
        typical = Offer(SeqId(0), self.source, Acceptance(self.shares).survival(0, DEPTHS[-1], 0.0))
        if not self._controller.choose(num_sequences, (), [typical], DEPTHS[-1]):
            return []
        offers: list[Offer] = []
        behind: list[Sequence] = []
        for sequence in decoding:
            width = min(DEPTHS[-1], sequence.num_left - 1)
            if width < 1:
                continue
            if (missing := self._model.num_missing(sequence)) == 0:
                survival = self._acceptance(sequence.spec.seq_id).survival(0, width, 0.0)
                offers.append(Offer(sequence.spec.seq_id, self.source, survival))
            elif missing / tokens_per_s < CATCH_UP_SHARE * sequence.num_left * costs.plain(num_sequences):
                behind.append(sequence)
        if behind:
            self._model.catch_up(behind, max(16, int(tokens_per_s * MOST_OF_A_STEP * costs.plain(num_sequences))))
        return offers

    def draft(self, decoding: Seq[Sequence], picks: Mapping[SeqId, Pick]) -> dict[SeqId, Draft]:
        widths = {seq_id: pick.width for seq_id, pick in picks.items() if pick.source == self.source}
        if not widths:
            return {}
        self._num_unused = 0
        drafted = self._model.draft([s for s in decoding if s.spec.seq_id in widths], widths)
        return {seq_id: Draft(token_ids, self.source) for seq_id, token_ids in drafted.items()}

    def verified(self, seq_id: SeqId, num_drafted: int, num_accepted: int) -> None:
        acceptance = self._acceptance(seq_id)
        acceptance.came_true(0, num_accepted)
        if num_accepted < num_drafted:
            acceptance.missed(num_accepted)

    def forget(self, seq_id: SeqId) -> None:
        self._model.forget(seq_id)
        self._acceptances.pop(seq_id, None)

    def _acceptance(self, seq_id: SeqId) -> Acceptance:
        found = self._acceptances.get(seq_id)
        if found is None:
            found = self._acceptances[seq_id] = Acceptance(self.shares)
        return found

    def _fade(self) -> None:
        self.shares = Shares([(known + prior) / 2 for known, prior in zip(self.shares.misses, PRIOR, strict=True)])
        self._acceptances.clear()
