"""How many drafts of whom are worth verifying in the next step. Pure.

A token is worth the time that the batch takes for one on average, so a draft is worth that time its chance of coming
true, and costs what its row adds to the step. Drafts are taken in order of survival over the whole batch as far as the
sum of that difference rises: one pass, one maximum. (Maximising tokens per second of each single step instead spends too
much on steps that cannot be helped.) Cf. arXiv 2406.14066, TurboSpec.

What speculation gained is booked against what it cost; while it owes more than ALLOWANCE, steps are plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfire.engine.sequence import SeqId
from splitfire.engine.speculation.costs import MAX_EXTRA_ROWS, StepCosts

SPEED_SMOOTHING = 0.06  # of a step in the speed of its batch
REFRESH = 16  # steps
NUM_UNSURE = 4  # steps until a speed is believed
DEPTHS = (1, 2, 3, 4, 6, 8)  # of the draft model, for all its sequences alike
ALLOWANCE = 4.0  # plain steps that may be lost at first
INCOME = 0.005  # of the time, that may be lost later
MAX_CREDIT = 8.0  # plain steps: gains of long ago do not pay for losses now
MAX_ALONE_S = 0.2  # that drafts may add to the step of a sequence that is alone
MAX_STRETCH, MIN_STRETCH_S = 2.0, 0.015  # and to others': so many plain steps, or this where that is less
FIRST_PAUSE, MAX_PAUSE = 16, 512  # steps


@dataclass(frozen=True, slots=True)
class Offer:
    """What a drafter could propose for a sequence: the chance of each token that it and all before it come true."""

    seq_id: SeqId
    source: str
    survival: Sequence[float]


@dataclass(frozen=True, slots=True)
class Pick:
    """Of a sequence's drafter so many tokens."""

    source: str
    width: int


class Controller:
    """Chooses drafters and widths. Owned by the engine thread."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._speeds: dict[int, _Speed] = {}  # by bit length of the number of sequences
        self._credit = ALLOWANCE  # in plain steps
        self._pause = FIRST_PAUSE
        self._num_paused = 0  # steps left
        self._num_observed = 0
        self._bounds: dict[int, _Bounds] = {}  # by number of sequences; made anew now and then

    def is_worthwhile(self, num_sequences: int) -> bool:
        """Whether drafts that all come true would be faster than none."""
        return not self._num_paused and self._bound(num_sequences).is_worthwhile

    def least_survival(self, num_sequences: int) -> float:
        """Drafts less likely than this are not looked at."""
        return self._bound(num_sequences).least_survival

    def choose(self, num_sequences: int, offers: Sequence[Offer], modelled: Sequence[Offer], room: int) -> dict[SeqId, Pick]:
        """`offers` cost nothing but their rows, one a sequence; `modelled` are the draft model's, which also cost its time.
        At most `room` tokens in all."""
        second = self._seconds_per_token(num_sequences)
        if self._speed(num_sequences).count < NUM_UNSURE:
            for _ in range(3):  # Dinkelbach: towards the rate that these offers allow
                second = self._best(num_sequences, offers, room, second).seconds_per_token
        best = self._best(num_sequences, offers, room, second)
        for depth in DEPTHS if modelled else ():
            mixed, num_drafting = self._mix(num_sequences, offers, modelled, depth, second)
            if num_drafting:
                drafting_s = depth * self.costs.draft(num_drafting)
                best = max(best, self._best(num_sequences, mixed, room, second, drafting_s), key=lambda b: b.value)
        return _picks(best)

    def observe(self, num_sequences: int, num_extra: int, num_tokens: int, step_s: float, proposing_s: float) -> None:
        """What became of a step in which nothing but decoding sequences was computed."""
        plain_s = max(self.costs.plain(num_sequences) * self.costs.ratio, 1e-9)
        self.costs.observe(num_sequences, num_extra, step_s)
        num_steps, took = num_tokens / num_sequences, (step_s + proposing_s) / plain_s
        self._speed(num_sequences).observe(num_steps, took)
        self._num_observed += 1
        if self._num_observed % REFRESH == 0:
            self._bounds.clear()
        if self._num_paused:
            self._num_paused -= 1
        else:
            self._book(INCOME + (num_steps - took if num_extra else -proposing_s / plain_s))

    def _bound(self, num_sequences: int) -> _Bounds:
        found = self._bounds.get(num_sequences)
        if found is None:
            second, added = self._seconds_per_token(num_sequences), self.costs.added(num_sequences)
            pays = any(rows * second > added[rows] for rows in (1, 2, 4, 8, 16, 32, 64, 128))
            least = max(0.02, 0.5 * added[-1] / (len(added) - 1) / second)
            found = self._bounds[num_sequences] = _Bounds(pays, least)
        return found

    def _book(self, gain: float) -> None:
        self._credit = min(self._credit + gain, MAX_CREDIT)
        if self._credit < 0.0:
            self._credit = ALLOWANCE / 2
            self._num_paused, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE)
        elif self._credit == MAX_CREDIT:
            self._pause = FIRST_PAUSE

    def _speed(self, num_sequences: int) -> _Speed:
        found = self._speeds.get(num_sequences.bit_length())
        if found is None:
            found = self._speeds[num_sequences.bit_length()] = _Speed()
        return found

    def _seconds_per_token(self, num_sequences: int) -> float:
        """Of the batch as it goes now, in the cost table's seconds; never slower than without drafts."""
        return self.costs.plain(num_sequences) / num_sequences / max(1.0, self._speed(num_sequences).value)

    def _longest(self, num_sequences: int) -> float:
        """Seconds that drafts may add to a step: nobody is kept from cancelling, and others wait little for who drafts much."""
        if num_sequences == 1:
            return MAX_ALONE_S / self.costs.ratio
        return max(MAX_STRETCH * self.costs.plain(num_sequences), MIN_STRETCH_S / self.costs.ratio)

    def _mix(
        self, num_sequences: int, offers: Sequence[Offer], modelled: Sequence[Offer], depth: int, second: float
    ) -> tuple[list[Offer], int]:
        """Of each sequence the offer that gains more, the draft model's cut to `depth`; and how many are the model's."""
        added = self.costs.added(num_sequences)
        row_s = added[min(len(added) - 1, 2 * num_sequences)] / (2 * num_sequences)
        least = row_s / second
        mixed = {offer.seq_id: offer for offer in offers}
        num_drafting = 0
        for offer in modelled:
            cut = Offer(offer.seq_id, offer.source, offer.survival[:depth])
            other = mixed.get(offer.seq_id)
            if other is None or _gain(cut, least) > _gain(other, least):
                mixed[offer.seq_id] = cut
                num_drafting += 1
        return list(mixed.values()), num_drafting

    def _best(self, num_sequences: int, offers: Sequence[Offer], room: int, second: float, drafting_s: float = 0.0) -> _Best:
        chances: list[float] = []
        for offer in offers:
            chances += offer.survival
        chances.sort(reverse=True)
        added, longest_s = self.costs.added(num_sequences), self._longest(num_sequences)
        expected = best_expected = best_value = 0.0
        count = 0
        for rows, chance in enumerate(chances[: min(room, MAX_EXTRA_ROWS)], 1):
            if added[rows] > longest_s:
                break
            expected += chance
            value = expected * second - added[rows]
            if value > best_value:
                best_value, best_expected, count = value, expected, rows
        seconds = self.costs.plain(num_sequences) + added[count] + drafting_s
        return _Best(
            offers if count else (), chances[count - 1] if count else 2.0, count, best_value - drafting_s,
            seconds / (num_sequences + best_expected),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What can be said before anything is offered."""

    is_worthwhile: bool
    least_survival: float


class _Speed:
    """By what factor steps are worth more than plain ones: running means of the plain steps' worth of tokens they bring,
    and of the plain steps' time they take."""

    def __init__(self) -> None:
        self.count = 0
        self._brought = 0.0
        self._took = 0.0

    @property
    def value(self) -> float:
        """1 until there are NUM_UNSURE steps."""
        return self._brought / max(self._took, 1e-6) if self.count >= NUM_UNSURE else 1.0

    def observe(self, brought: float, took: float) -> None:
        self.count += 1
        smoothing = max(SPEED_SMOOTHING, 1.0 / self.count)
        self._brought += smoothing * (brought - self._brought)
        self._took += smoothing * (took - self._took)


@dataclass(frozen=True, slots=True)
class _Best:
    """The best way to spend a step on some offers: every draft above `least`, `count` in all."""

    offers: Sequence[Offer]
    least: float
    count: int
    value: float  # seconds it saves
    seconds_per_token: float


def _gain(offer: Offer, least: float) -> float:
    return sum(chance - least for chance in offer.survival if chance > least)


def _picks(best: _Best) -> dict[SeqId, Pick]:
    picks: dict[SeqId, Pick] = {}
    left = best.count
    for offer in best.offers:
        width = 0
        while width < len(offer.survival) and width < left and offer.survival[width] >= best.least:
            width += 1
        if width:
            picks[offer.seq_id] = Pick(offer.source, width)
            left -= width
    return picks
