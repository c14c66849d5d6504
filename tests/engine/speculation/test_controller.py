"""The controller against every fixed width, on traces of what would have come true, while acceptance and load drift."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from splitfire.engine.sequence import SeqId
from splitfire.engine.speculation.acceptance import Acceptance, Shares
from splitfire.engine.speculation.controller import ALLOWANCE, Controller, Offer
from splitfire.engine.speculation.costs import CostPoint, StepCosts

WIDTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
NUM_TOKENS = 4000
Trace = list[bool]  # of each token: whether a text that is followed says the same
Cost = Callable[[int], float]  # seconds of a step by its rows


def regimes(draw: random.Random, length: int) -> Trace:
    """Shares of right tokens that change every 150 tokens or so."""
    levels = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)
    level, trace = draw.choice(levels), []
    for _ in range(length):
        level = draw.choice(levels) if draw.random() < 1 / 150 else level
        trace.append(draw.random() < level)
    return trace


def waves(draw: random.Random, length: int) -> Trace:
    phase, period = draw.random() * 2 * math.pi, draw.choice((200, 500))
    return [draw.random() < 0.5 + 0.48 * math.sin(phase + 2 * math.pi * i / period) for i in range(length)]


def edits(draw: random.Random, length: int) -> Trace:
    """Long runs, short gaps: a text that was edited."""
    is_right, trace = True, []
    for _ in range(length):
        is_right = draw.random() > 0.03 if is_right else draw.random() < 0.25
        trace.append(is_right)
    return trace


def nothing(draw: random.Random, length: int) -> Trace:
    return [False] * length


def small(rows: int) -> float:
    """A small model on few cores: rows soon cost."""
    return 0.007 + 0.00045 * rows


def large(rows: int) -> float:
    """Rows hide under the read of the weights."""
    return 0.005 + 0.0001 * rows


def steps(rows: int) -> float:
    """A staircase, as padded shapes make."""
    return 0.006 + 0.003 * math.ceil(rows / 16)


def measured(cost: Cost) -> StepCosts:
    extra = (0, 1, 3, 7, 15, 31, 63, 127)
    return StepCosts([CostPoint(n, n + more, cost(n + more)) for n in (1, 4, 16, 64) for more in extra])


@dataclass
class Stream:
    """A sequence in the simulation."""

    seq_id: SeqId
    trace: Trace
    acceptance: Acceptance
    at: int = 0
    evidence: int = 0

    def verify(self, width: int) -> int:
        """Tokens one step brings: those in a row that came true, and one more. The drafter learns from each."""
        count = 0
        while count < width and self.trace[self.at + count]:
            count += 1
        for came_true in self.trace[self.at : self.at + count + 1]:
            if came_true:
                self.acceptance.came_true(self.evidence)
                self.evidence += 1
            else:
                self.acceptance.missed(self.evidence)
                self.evidence = 0
        self.at += count + 1
        return count + 1

    @property
    def left(self) -> int:
        return len(self.trace) - self.at - 1


@dataclass
class Simulation:
    """Streams come and go so that as many run as the load says, which changes all the time."""

    seed: int
    make: Callable[[random.Random, int], Trace]
    cost: Cost
    loads: tuple[int, ...]
    shares: Shares = field(default_factory=Shares)

    def tokens_per_s(self, width: int | None) -> float:
        """With a fixed width, or (None) with the controller."""
        load, texts, noise = (random.Random(f"{self.seed}-{what}") for what in ("load", "texts", "noise"))
        controller = Controller(measured(self.cost)) if width is None else None
        seconds, num_tokens, streams = 0.0, 0, list[Stream]()
        for _ in range(4):
            num_streams = load.choice(self.loads)
            until = num_tokens + NUM_TOKENS // 4
            while num_tokens < until:
                streams = [s for s in streams if s.left > 0]
                while len(streams) < num_streams:
                    trace = self.make(texts, texts.randrange(100, 600))
                    streams.append(Stream(SeqId(texts.getrandbits(60)), trace, Acceptance(self.shares)))
                running = streams[:num_streams]
                if controller is None:
                    widths = {s.seq_id: min(width or 0, s.left) for s in running}
                else:
                    widths = choose(controller, running)
                num_extra = sum(widths.values())
                brought = sum(s.verify(widths.get(s.seq_id, 0)) for s in running)
                step_s = self.cost(num_streams + num_extra) * math.exp(noise.gauss(0, 0.05))
                if controller is not None:
                    controller.observe(num_streams, num_extra, brought, step_s, 0.0)
                seconds, num_tokens = seconds + step_s, num_tokens + brought
        return num_tokens / seconds


def choose(controller: Controller, running: list[Stream]) -> dict[SeqId, int]:
    if not controller.is_worthwhile(len(running)):
        return {}
    least = controller.least_survival(len(running))
    offers = [Offer(s.seq_id, "text", s.acceptance.survival(s.evidence, min(128, s.left), least)) for s in running]
    return {seq_id: pick.width for seq_id, pick in controller.choose(len(running), offers, (), 256).items()}


@pytest.mark.parametrize(("make", "cost"), [(regimes, small), (waves, large), (edits, steps), (edits, small), (waves, steps)])
def test_no_fixed_width_is_better_by_more_than_three_percent(make: Callable[[random.Random, int], Trace], cost: Cost) -> None:
    """Each trace with the width that suits it best, in hindsight."""
    ours = best = 0.0
    for seed in (1, 2):
        ours += Simulation(seed, make, cost, (1, 2, 4, 8, 16, 32)).tokens_per_s(None)
        best += max(Simulation(seed, make, cost, (1, 2, 4, 8, 16, 32)).tokens_per_s(width) for width in WIDTHS)
    assert ours >= 0.97 * best


@pytest.mark.parametrize("load", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("cost", [small, steps])
def test_a_text_that_never_comes_true_costs_nothing(load: int, cost: Cost) -> None:
    ours, none = (Simulation(3, nothing, cost, (load,)).tokens_per_s(width) for width in (None, 0))
    assert ours >= 0.99 * none


def certain(seq_id: int, width: int) -> Offer:
    return Offer(SeqId(seq_id), "text", [0.999] * width)


def test_rows_go_to_whoever_needs_them_most() -> None:
    controller = Controller(measured(small))
    likely, unlikely = Offer(SeqId(1), "text", [0.9, 0.8, 0.7, 0.6]), Offer(SeqId(2), "text", [0.3, 0.1, 0.03])
    picks = controller.choose(2, [unlikely, likely], (), 256)
    assert picks[SeqId(1)].width == 4
    assert picks.get(SeqId(2)) is None or picks[SeqId(2)].width < 3
    assert sum(p.width for p in controller.choose(2, [certain(1, 50), certain(2, 50)], (), 7).values()) == 7


def test_nothing_is_drafted_where_rows_cost_what_steps_do() -> None:
    controller = Controller(measured(lambda rows: 0.001 * rows))
    assert not controller.is_worthwhile(4)
    assert controller.choose(4, [certain(1, 20)], (), 256) == {}


def test_others_wait_little_for_who_drafts_much() -> None:
    """One whose text comes true would like a hundred rows; its neighbours get a token a step all the same."""
    controller = Controller(measured(lambda rows: 0.02 + 0.001 * rows))
    alone = controller.choose(1, [certain(1, 128)], (), 256)[SeqId(1)].width
    beside = controller.choose(3, [certain(1, 128)], (), 256)[SeqId(1)].width
    assert alone == 128
    assert 30 < beside <= 2 * 23, "two plain steps"


def test_a_draft_model_is_used_where_its_time_pays() -> None:
    points = [CostPoint(n, n + more, large(n + more)) for n in (1, 4) for more in (0, 8, 64)]

    def picked(draft_s: float, *offers: Offer) -> dict[SeqId, str]:
        costs = StepCosts(points, [CostPoint(1, 1, draft_s), CostPoint(4, 4, draft_s)])
        modelled = [Offer(SeqId(i), "model", [0.8, 0.64, 0.51, 0.41]) for i in (1, 2)]
        return {seq_id: pick.source for seq_id, pick in Controller(costs).choose(2, offers, modelled, 256).items()}

    assert picked(0.0002) == {1: "model", 2: "model"}
    assert picked(0.05) == {}
    assert picked(0.0002, certain(1, 5)) == {1: "text", 2: "model"}, "one of them for each sequence, never both in one"
    assert picked(0.05, certain(1, 5)) == {1: "text"}
    assert picked(0.0002, Offer(SeqId(1), "text", [0.1])) == {1: "model", 2: "model"}


def test_losses_stop_at_the_allowance_whatever_the_offers_say() -> None:
    """Drafters that promise everything and keep nothing: the estimates may be wrong."""
    controller = Controller(measured(small))
    lost = steps_made = 0.0
    for _ in range(3000):
        width = 0
        if controller.is_worthwhile(1):
            width = sum(p.width for p in controller.choose(1, [certain(1, 64)], (), 256).values())
        controller.observe(1, width, 1, small(1 + width), 0.0)
        lost += small(1 + width) / small(1) - 1
        steps_made += 1
    assert lost < ALLOWANCE + 8 + 0.02 * steps_made


def test_a_pause_ends() -> None:
    controller = Controller(measured(small))
    while controller.is_worthwhile(1):
        controller.observe(1, 64, 1, small(65), 0.0)
    for _ in range(40):
        controller.observe(1, 0, 1, small(1), 0.0)
    assert controller.is_worthwhile(1)
