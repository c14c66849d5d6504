"""An engine whose pool is always too small, in any order of events: nothing leaks, nobody starves, and every token is the one
that its sequence gets alone.

Everything is real but the model, whose logits after a position are a function of the KV of all positions so far, read from the
pool: a block that was mixed up, stale or given away too early shows as another token.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitfire.core.layout import KvLayout
from splitfire.core.model_config import ModelConfig
from splitfire.core.sampling import SamplingParams
from splitfire.engine.batch import StepBatch
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drafting import Draft, Verified
from splitfire.engine.engine import Engine
from splitfire.engine.lending import Reservation
from splitfire.engine.logits import Logits
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Runner
from splitfire.engine.scheduler import Budget, Step, _turn
from splitfire.engine.sequence import Fork, Purpose, SeqId, Sequence, SequenceSpec
from splitfire.engine.updates import SequenceUpdate
from tests.engine.ahead import AheadRunner
from tests.engines import GREEDY, assert_no_leaks, make_spec

VOCAB = 32
BLOCK = 4
LAYOUT = KvLayout("fp32", num_layers=1, num_kv_heads=1, head_dim=1, block_size=BLOCK)
CPU = torch.device("cpu")
LOGITS = torch.randn(4099, VOCAB, generator=torch.Generator().manual_seed(1))
STEMS = [[random.Random(i).randrange(VOCAB) for _ in range(40)] for i in range(2)]
SAMPLED = SamplingParams(temperature=1.0, seed=5)
MOST_TOKENS = 8 * BLOCK  # of a sequence and its answer; the smallest pool holds as many
_ids = itertools.count(1)


class SummingModel:
    """KV at a position is a function of its token and of the sum of all KV before it; logits one of the sum with it."""

    config = cast(ModelConfig, SimpleNamespace(vocab_size=VOCAB))

    def __init__(self) -> None:
        self.nan_lanes: frozenset[int] = frozenset()

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        cells = pool.elements[:, 0, 0, 0, :, 0].numpy()
        rows = np.zeros(len(batch.token_ids), np.int64)
        is_nan = np.zeros(len(rows), np.bool_)
        for i, lane in enumerate(batch.lanes.tolist()):
            begin, end = batch.query_begins[i : i + 2].tolist()
            length = int(batch.context_lens[i])
            ids = batch.block_tables[lane, : -(-length // BLOCK)]
            total = int(cells[ids].reshape(-1)[: length - (end - begin)].sum())
            for row in range(begin, end):
                position = int(batch.positions[row])
                code = (int(batch.token_ids[row]) * 7919 + position * 104729 + total * 31 + 1) % 4093
                cells[ids[position // BLOCK], position % BLOCK] = code
                total += code
                rows[row] = total % len(LOGITS)
            is_nan[begin:end] = lane in self.nan_lanes
        values = LOGITS[rows[batch.logit_rows]]
        values[is_nan[batch.logit_rows]] = torch.nan
        return Logits.of(values)


class Guesser:
    """Drafts what really follows, as far as it is told to be right, and then something else."""

    def __init__(self, answers: Mapping[SeqId, Seq[int]]) -> None:
        self.answers = answers
        self.num_right = 0
        self.num_wrong = 0

    def can_skip(self, num_decoding: int) -> bool:
        return not self.num_right and not self.num_wrong

    def skip(self, num_decoding: int) -> None: ...

    def propose(self, decoding: Seq[Sequence], room: int) -> Mapping[SeqId, Draft]:
        drafts = {}
        for sequence in decoding:
            following = self.answers[sequence.spec.seq_id][sequence.num_output :]
            right = list(following[: self.num_right])
            wrong = [(token + 1) % VOCAB for token in following[self.num_right :][: self.num_wrong]]
            if right or wrong:
                drafts[sequence.spec.seq_id] = Draft((*right, *wrong), "guess")
        return drafts

    def verified(self, results: Seq[Verified], num_rows: int, duration_s: float) -> None: ...

    def forget(self, seq_id: SeqId) -> None: ...


def engine_of(
    num_blocks: int, budget: Budget, guesser: Guesser | None = None, *, caches_prefixes: bool = False, runs_ahead: bool = False
) -> Engine:
    runner = (AheadRunner if runs_ahead else Runner)(SummingModel(), KvPool(LAYOUT, num_blocks, CPU))
    return Engine(runner, BlockPool(num_blocks, caches_prefixes=caches_prefixes), budget, lambda: 0.0, guesser)


def alone(spec: SequenceSpec) -> list[int]:
    """The whole answer to one choice, from the first token on."""
    engine = engine_of(16, Budget(64, 1))
    engine.add(replace(spec, output=(), purpose=Purpose.GENERATE))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token.token_id for update in engine.step().updates for token in update.tokens]
    return tokens


def prefilled(spec: SequenceSpec) -> torch.Tensor:
    """The bytes of its prompt's blocks, as another worker computes them."""
    engine = engine_of(16, Budget(64, 1))
    engine.add(replace(spec, purpose=Purpose.PREFILL, forks=()))
    [update] = engine.step().updates
    return engine.runner.pool.raw[list(update.block_ids)]


@dataclass
class Arriving:
    """A hand-off under way."""

    reservation: Reservation
    payload: torch.Tensor
    num_written: int


specs = st.fixed_dictionaries(
    {
        "stem": st.integers(0, len(STEMS) - 1),
        "length": st.integers(1, 14),
        "tail": st.lists(st.integers(0, VOCAB - 1), max_size=1),
        "max_tokens": st.sampled_from([1, 2, 7, 12, 18, 22, 26]),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "priority": st.sampled_from([0, 0, 0, 1]),
        "is_sampled": st.booleans(),
        "stops": st.sampled_from([False, False, True]),
    }
)


class EngineUnderPressure(RuleBasedStateMachine):
    """Sequences come by prompt and by hand-off, alone and as several choices, are drafted for, cancelled, spoilt and preempted."""

    @initialize(
        num_blocks=st.integers(8, 12), budget=st.builds(Budget, st.integers(2, 24), st.integers(2, 6), st.sampled_from([None, 1, 4, 9])),
        caches_prefixes=st.booleans(), runs_ahead=st.booleans(),
    )  # fmt: skip
    def start(self, num_blocks: int, budget: Budget, caches_prefixes: bool, runs_ahead: bool) -> None:
        self.answers: dict[SeqId, list[int]] = {}
        self.guesser = Guesser(self.answers)
        self.engine = engine_of(num_blocks, budget, self.guesser, caches_prefixes=caches_prefixes, runs_ahead=runs_ahead)
        self.scheduler = self.engine._scheduler
        self.budget = self.scheduler.budget
        self.got: dict[SeqId, list[int]] = {}  # by choice, tokens that were streamed before included
        self.open: list[SeqId] = []
        self.ended: set[SeqId] = set()
        self.cancelled: set[SeqId] = set()
        self.poisoned: set[SeqId] = set()
        self.failed: set[SeqId] = set()
        self.held: list[SeqId] = []
        self.arriving: list[Arriving] = []
        self.num_steps_owed = 0

    # -- what comes

    def make(self, asked: Mapping[str, Any], streamed: int = 0, purpose: Purpose = Purpose.GENERATE) -> SequenceSpec:
        prompt = STEMS[asked["stem"]][: asked["length"]] + asked["tail"]
        plain = make_spec(
            prompt, min(asked["max_tokens"], MOST_TOKENS - len(prompt)), block_size=BLOCK, priority=asked["priority"],
            sampling=SAMPLED if asked["is_sampled"] else GREEDY, stop=frozenset({3, 17}) if asked["stops"] else frozenset(),
        )  # fmt: skip
        answers = [alone(replace(plain, choice=choice)) for choice in range(asked["n"])]
        output = tuple(answers[0][: min(streamed, len(answers[0]) - 1)]) if asked["n"] == 1 else ()
        spec = make_spec(
            prompt, plain.stopping.max_tokens, output=output, block_size=BLOCK, priority=plain.priority, sampling=plain.sampling,
            stop=plain.stopping.stop_token_ids, purpose=purpose,
        )  # fmt: skip
        if asked["n"] > 1:
            spec = replace(spec, forks=tuple(Fork(SeqId(10**9 + next(_ids)), choice) for choice in range(asked["n"])))
        for fork, answer in zip(spec.choices, answers, strict=True):
            self.answers[fork.seq_id] = answer
            self.got[fork.seq_id] = [*output]
        self.num_steps_owed += spec.ends_at * asked["n"] * 2
        return spec

    @rule(asked=specs, streamed=st.integers(0, 3))
    def add(self, asked: Mapping[str, Any], streamed: int) -> None:
        spec = self.make(asked, streamed)
        self.engine.add(spec)
        self.open += [fork.seq_id for fork in spec.choices]

    @rule(asked=specs)
    def compute_for_another_worker(self, asked: Mapping[str, Any]) -> None:
        spec = self.make(asked, purpose=Purpose.PREFILL)
        self.engine.add(spec)
        self.held.append(spec.seq_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def another_worker_has_it(self, data: st.DataObject) -> None:
        self.engine.finish(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(asked=specs)
    def offer(self, asked: Mapping[str, Any]) -> None:
        spec = self.make(asked)
        reservation = self.engine.lending.reserve(spec)
        if reservation is not None:
            self.arriving.append(Arriving(reservation, prefilled(spec), reservation.num_pinned))

    @precondition(lambda self: self.arriving)
    @rule(data=st.data(), num_blocks=st.integers(1, 6))
    def arrive(self, data: st.DataObject, num_blocks: int) -> None:
        each = data.draw(st.sampled_from(self.arriving))
        self.write(each, num_blocks)
        if each.num_written == len(each.payload):
            self.join(each, data.draw(st.integers(0, 7)))

    @precondition(lambda self: self.arriving)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        each = self.arriving.pop(data.draw(st.integers(0, len(self.arriving) - 1)))
        self.engine.lending.forfeit(each.reservation)

    def write(self, each: Arriving, num_blocks: int) -> None:
        ids, begin = each.reservation.block_ids, each.num_written
        end = each.num_written = min(begin + num_blocks, len(each.payload))
        self.engine.runner.pool.raw[ids[begin:end]] = each.payload[begin:end]
        self.engine.lending.commit(each.reservation, begin, end - begin, each.reservation.spec.block_hashes)

    def join(self, each: Arriving, unwanted: int) -> None:
        """Without those choices whose bit is set in `unwanted`, and those that end with their first token."""
        self.arriving.remove(each)
        spec, firsts = each.reservation.spec, {}
        for i, fork in enumerate(spec.choices):
            if len(self.answers[fork.seq_id]) > 1 and not unwanted >> i & 1:
                firsts[fork.seq_id] = self.answers[fork.seq_id][0]
                self.got[fork.seq_id] = [firsts[fork.seq_id]]
        if not firsts:
            self.engine.lending.forfeit(each.reservation)
            return
        self.engine.join(each.reservation, firsts)
        self.open += firsts

    # -- what happens

    @rule(num_steps=st.integers(1, 9), num_right=st.sampled_from([0, 0, 0, 1, 3, 6]), num_wrong=st.sampled_from([0, 0, 0, 1, 9]))
    def run_steps(self, num_steps: int, num_right: int, num_wrong: int) -> None:
        self.guesser.num_right, self.guesser.num_wrong = num_right, num_wrong
        for _ in range(num_steps):
            self.one_step()

    def one_step(self) -> None:
        scheduler = self.scheduler
        model = cast(SummingModel, self.engine.runner.model)
        schedule = scheduler.schedule

        def scheduled(limit: int | None, drafts: Mapping[SeqId, Draft] | None) -> Step:
            step = schedule(limit, drafts)
            lanes = [piece.sequence for piece in step.pieces()]
            spoilt = [s for s in lanes if self.poisoned & {choice.seq_id for choice in s.spec.choices}]
            self.poisoned.update(choice.seq_id for s in spoilt for choice in s.spec.choices)
            model.nan_lanes = frozenset(s.lane for s in spoilt)
            num_drafts = sum(len(piece.drafts) for piece in step.slices)
            num_decoding = sum(s.is_decoding for s in lanes)
            assert step.num_rows - num_drafts <= max(self.budget.chunk_tokens, num_decoding)
            assert not num_drafts or step.num_rows <= self.budget.chunk_tokens + self.budget.max_running
            if not scheduler.lanes.num_in_flight.any():
                assert {s.spec.seq_id for s in scheduler.running if s.is_decoding} <= {s.spec.seq_id for s in lanes}
            return step

        scheduler.schedule = scheduled  # type: ignore[method-assign, assignment]
        try:
            result = self.engine.step()
        finally:
            scheduler.schedule = schedule  # type: ignore[method-assign]
        if not result.num_rows and self.engine.has_work:
            assert not scheduler.running
            assert self.arriving or scheduler.held, "nothing runs and nothing is lent, and still somebody waits"
        for update in result.updates:
            self.heard(update)

    def heard(self, update: SequenceUpdate) -> None:
        if update.seq_id in self.held:
            self.heard_of_prompt(update)
            return
        assert update.seq_id in self.open or not (update.tokens or update.is_finished)
        if update.tokens:
            got = self.got[update.seq_id]
            assert update.offset == len(got)
            got += [token.token_id for token in update.tokens]
            assert got == self.answers[update.seq_id][: len(got)], "another token than alone"
        if update.error:
            assert update.error == "nonfinite_logits" and update.is_finished and update.seq_id in self.poisoned
            self.failed.add(update.seq_id)
        if update.is_finished:
            self.open.remove(update.seq_id)
            self.ended.add(update.seq_id)

    def heard_of_prompt(self, update: SequenceUpdate) -> None:
        for each in update.forks or ((update,) if update.tokens else ()):
            assert [token.token_id for token in each.tokens] == self.answers[each.seq_id][:1]
        if update.is_finished:
            self.held.remove(update.seq_id)
            assert bool(update.error) == (update.seq_id in self.poisoned)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq_id = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.engine.finish(seq_id)
        self.cancelled.add(seq_id)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def its_logits_become_nan(self, data: st.DataObject) -> None:
        self.poisoned.add(data.draw(st.sampled_from(self.open)))

    # -- what holds at any moment

    @invariant()
    def every_block_is_free_or_has_its_users(self) -> None:
        if not hasattr(self, "engine"):
            return
        blocks, scheduler = self.engine.blocks, self.scheduler
        blocks.check()
        scheduler.lanes.check()
        users: Counter[int] = Counter()
        for sequence in (*scheduler.running, *scheduler.held.values()):
            assert sequence.num_computed <= len(sequence.block_ids) * BLOCK
            users.update(sequence.block_ids)
        for each in self.arriving:
            users.update(each.reservation.block_ids)
        assert {i: block.num_users for i, block in enumerate(blocks._blocks) if block.num_users} == dict(users)
        assert blocks.num_available == blocks.num_blocks - len(users)
        assert not any(sequence.block_ids for sequence in scheduler.waiting)

    @invariant()
    def nobody_is_lost(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.scheduler
        assert scheduler.num_reserved == sum(each.reservation.num_lanes for each in self.arriving)
        assert len(scheduler.running) + scheduler.num_reserved <= self.budget.max_running
        assert scheduler._num_queued_tokens == sum(s.num_tokens for s in scheduler.waiting)
        assert scheduler.prefilling == sorted((s for s in scheduler.running if not s.is_decoding), key=_turn)
        assert all(self.engine._sequences.get(seq_id) or seq_id in self.engine._sequences._unforked for seq_id in self.open)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for each in list(self.arriving):
            self.write(each, len(each.payload))
            self.join(each, 0)
        for seq_id in self.held:
            self.engine.finish(seq_id)
        self.held = []
        num_steps = 0
        while self.engine.has_work:
            self.one_step()
            num_steps += 1
            assert num_steps <= self.num_steps_owed, "somebody starves"
        self.every_block_is_free_or_has_its_users()
        assert_no_leaks(self.engine)
        assert not self.open and not self.engine._sequences._by_id and not self.engine._sequences._unforked
        for seq_id in self.ended - self.failed:
            assert self.got[seq_id] == self.answers[seq_id]


EngineUnderPressure.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestEngineUnderPressure = pytest.mark.timeout(600)(EngineUnderPressure.TestCase)  # what fails is shrunk, for up to five minutes
