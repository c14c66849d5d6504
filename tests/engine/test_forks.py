"""Several choices of one prompt: computed once, shared until they differ, and then nothing binds them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch

from splitfire.core.sampling import SamplingParams
from splitfire.engine import drawing
from splitfire.engine.blocks import BlockState
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.sample import Draw, SampledToken, SampleRow, sample
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.sequence import Fork, Purpose, SeqId, SequenceSpec
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import VOCAB, family_configs, save_checkpoint
from tests.engines import assert_no_leaks, drain, load_model, make_engine, make_spec, sampled_of, tokens_of

SAMPLED = SamplingParams(temperature=1.1, top_p=0.95, seed=11, logprobs=1, frequency_penalty=0.2)
GREEDY = SamplingParams(temperature=0.0)
_ids = itertools.count(1_000_000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return load_model(path)


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{seed}-{length}")
    return [draw.randrange(VOCAB) for _ in range(length)]


def together(
    length: int, max_tokens: int, n: int = 4, *, sampling: SamplingParams = SAMPLED, purpose: Purpose = Purpose.GENERATE,
    stop: frozenset[int] = frozenset(),
) -> SequenceSpec:  # fmt: skip
    spec = make_spec(prompt(length), max_tokens, sampling=sampling, purpose=purpose, stop=stop)
    return replace(spec, forks=tuple(Fork(SeqId(next(_ids)), choice) for choice in range(n)))


def alone(spec: SequenceSpec) -> list[SequenceSpec]:
    return [spec.alone(fork) for fork in spec.forks]


def singly(model: Transformer, spec: SequenceSpec) -> list[list[int]]:
    """What each choice says as a request of its own."""
    engine = make_engine(model)
    specs = [replace(one, seq_id=SeqId(next(_ids))) for one in alone(spec)]
    for one in specs:
        engine.add(one)
    updates = drain(engine)
    return [tokens_of(updates, one) for one in specs]


def step(engine: Engine) -> list[SequenceUpdate]:
    updates = engine.step().updates
    engine.blocks.check()
    engine._scheduler.lanes.check()
    return updates


@pytest.mark.parametrize("length", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_of_each_choice_are_those_of_a_request_of_its_own(llama: Transformer, length: int, sampling: SamplingParams) -> None:
    spec = together(length, 30, sampling=sampling)
    expected = singly(llama, spec)
    if sampling is SAMPLED:
        assert len({tuple(tokens) for tokens in expected}) == 4
    engine = make_engine(llama, chunk_tokens=64)
    mate = make_spec(prompt(40, 9), 20)
    engine.add(mate)
    engine.add(spec)
    updates = drain(engine)
    for one, tokens in zip(alone(spec), expected, strict=True):
        assert tokens_of(updates, one) == tokens
        assert all((t.logprob is None) == (sampling is GREEDY) for t in sampled_of(updates, one))
    firsts = [u for u in updates if u.times is not None and u.seq_id != mate.seq_id]
    assert [u.seq_id for u in firsts] == [f.seq_id for f in spec.forks]
    assert_no_leaks(engine)


@pytest.mark.parametrize("length", [96, 100])
def test_the_prompt_is_computed_once_and_full_blocks_are_shared(llama: Transformer, length: int) -> None:
    engine = make_engine(llama)
    spec = together(length, 40)
    engine.add(spec)
    assert engine.step().num_rows == length
    is_partial = length % 32 > 0
    used = engine.load().total_blocks - engine.load().available_blocks
    assert used == 3 + 4 * is_partial, "only the last block is copied, and only where it is not full"
    assert engine.blocks.counts()[BlockState.COMMITTED] == 3
    assert engine.step().num_rows == 4
    sequences = [engine._sequences.get(fork.seq_id) for fork in spec.forks]
    tables = [s.block_ids for s in sequences if s is not None]
    assert len({tuple(t[:3]) for t in tables}) == 1 and len({t[3] for t in tables}) == 4
    for one in alone(spec):
        engine.finish(one.seq_id)
    assert_no_leaks(engine)


def test_forks_write_into_blocks_of_their_own(llama: Transformer) -> None:
    """Each one's last block holds the prompt's KV and then its own, whatever the others wrote meanwhile."""
    engine = make_engine(llama)
    spec = together(40, 200)
    engine.add(spec)
    for _ in range(20):
        step(engine)
    for one in alone(spec):
        sequence = engine._sequences.get(one.seq_id)
        assert sequence is not None
        lone = make_engine(llama)
        again = make_spec(sequence.tokens[:-1], 5, purpose=Purpose.PREFILL)
        lone.add(again)
        [update] = drain(lone)
        ours = engine.runner.pool.elements[sequence.block_ids[1], ..., : 59 - 32, :]
        torch.testing.assert_close(ours, lone.runner.pool.elements[update.block_ids[1], ..., : 59 - 32, :], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["queued", "in its prompt", "after the fork"])
@pytest.mark.parametrize("who", [0, 2])
def test_a_choice_that_is_cancelled_leaves_the_others(llama: Transformer, when: str, who: int) -> None:
    spec = together(100, 20)
    expected = singly(llama, spec)
    engine = make_engine(llama, chunk_tokens=64)
    engine.add(spec)
    updates = []
    for _ in range({"queued": 0, "in its prompt": 1, "after the fork": 5}[when]):
        updates += step(engine)
    engine.finish(spec.forks[who].seq_id)
    updates += drain(engine)
    for i, one in enumerate(alone(spec)):
        tokens = tokens_of(updates, one)
        assert tokens == expected[i] if i != who else len(tokens) == (4 if when == "after the fork" else 0)
    assert_no_leaks(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_when_all_choices_are_cancelled_nothing_is_computed_any_more(llama: Transformer, num_steps: int) -> None:
    spec = together(100, 50)
    engine = make_engine(llama, chunk_tokens=64)
    engine.add(spec)
    for _ in range(num_steps):
        engine.step()
    for fork in spec.forks:
        assert engine.has_work
        engine.finish(fork.seq_id)
        engine.finish(fork.seq_id)  # twice does no harm
    assert not engine.has_work
    assert_no_leaks(engine)


def test_a_choice_whose_first_token_ends_it_leaves_the_others(llama: Transformer) -> None:
    spec = together(50, 12)
    firsts = [tokens[0] for tokens in singly(llama, spec)]
    for stop in (frozenset(firsts[:1]), frozenset(firsts[1:3]), frozenset(firsts)):
        again = together(50, 12, stop=stop)
        expected = singly(llama, again)
        engine = make_engine(llama)
        engine.add(again)
        updates = drain(engine)
        for one, tokens in zip(alone(again), expected, strict=True):
            assert tokens_of(updates, one) == tokens
            [end] = [u for u in updates if u.seq_id == one.seq_id and u.is_finished]
            assert end.stopped == (tokens[-1] in stop)
        assert_no_leaks(engine)


def test_one_token_each_is_one_step(llama: Transformer) -> None:
    spec = together(50, 1)
    engine = make_engine(llama)
    engine.add(spec)
    updates = drain(engine)
    assert [tokens_of(updates, one) for one in alone(spec)] == singly(llama, spec)
    assert all(u.is_finished and not u.stopped for u in updates)
    assert_no_leaks(engine)


def test_a_fork_that_is_preempted_goes_on_with_its_tokens(llama: Transformer) -> None:
    spec = together(60, 60)
    expected = singly(llama, spec)
    engine = make_engine(llama, num_blocks=9)
    engine.add(spec)
    updates = drain(engine)
    assert engine._scheduler.num_preemptions > 0
    assert [tokens_of(updates, one) for one in alone(spec)] == expected
    assert_no_leaks(engine)


@pytest.mark.parametrize(("num_blocks", "max_running"), [(3, 8), (5, 8), (64, 1), (64, 3)])
def test_forks_without_room_wait_as_if_they_had_been_preempted(llama: Transformer, num_blocks: int, max_running: int) -> None:
    spec = together(60, 20)
    expected = singly(llama, spec)
    engine = make_engine(llama, num_blocks=num_blocks, max_running=max_running)
    engine.add(spec)
    updates = drain(engine)
    assert [tokens_of(updates, one) for one in alone(spec)] == expected
    assert_no_leaks(engine)


def test_a_group_that_is_preempted_in_its_prompt_is_still_one(llama: Transformer) -> None:
    """By a sequence of a higher class that needs its blocks."""
    spec = together(90, 10)
    expected = singly(llama, spec)
    engine = make_engine(llama, num_blocks=7, chunk_tokens=2)
    first = replace(make_spec(prompt(60, 3), 80), priority=2)
    engine.add(first)
    updates: list[SequenceUpdate] = []
    while len(tokens_of(updates, first)) < 2:
        updates += step(engine)
    engine.add(spec)
    while not engine._scheduler.num_preemptions:
        assert engine.has_work
        updates += step(engine)
    assert not any(u.seq_id in {fork.seq_id for fork in spec.forks} for u in updates), "it was still one"
    updates += drain(engine)
    assert [tokens_of(updates, one) for one in alone(spec)] == expected
    assert len(tokens_of(updates, first)) == 80
    assert_no_leaks(engine)


def test_a_choice_that_cannot_be_sampled_fails_alone(llama: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = together(50, 10)
    expected = singly(llama, spec)

    def poisoned(logits: torch.Tensor, rows: Seq[SampleRow], draw: Draw) -> list[SampledToken]:
        if any(row.choice == 2 for row in rows):
            raise ZeroDivisionError("poison")
        return sample(logits, rows, draw)

    monkeypatch.setattr(drawing, "sample", poisoned)
    engine = make_engine(llama)
    engine.add(spec)
    updates = drain(engine)
    assert [(u.seq_id, u.error) for u in updates if u.error] == [(spec.forks[2].seq_id, "sampling_failed")]
    for i, one in enumerate(alone(spec)):
        assert tokens_of(updates, one) == ([] if i == 2 else expected[i])
    assert_no_leaks(engine)


@pytest.mark.parametrize("purpose", list(Purpose))
def test_a_prompt_that_is_not_finite_fails_for_all_its_choices(
    llama: Transformer, monkeypatch: pytest.MonkeyPatch, purpose: Purpose
) -> None:
    logits = llama.logits
    monkeypatch.setattr(llama, "logits", lambda hidden: logits(hidden) * torch.nan)
    spec = together(50, 10, purpose=purpose)
    engine = make_engine(llama)
    engine.add(spec)
    updates = drain(engine)
    ids = [spec.seq_id] if purpose is Purpose.PREFILL else [fork.seq_id for fork in spec.forks]
    assert [(u.seq_id, u.error, u.is_finished) for u in updates] == [(i, "nonfinite_logits", True) for i in ids]
    assert engine.blocks.counts()[BlockState.CACHED] == 0
    assert_no_leaks(engine)


def test_a_prompt_for_another_worker_is_held_once_and_tells_the_first_token_of_each(llama: Transformer) -> None:
    spec = together(70, 10, purpose=Purpose.PREFILL)
    expected = singly(llama, spec)
    engine = make_engine(llama, chunk_tokens=32)
    engine.add(spec)
    *chunks, last = drain(engine)
    assert [u.seq_id for u in chunks] == [spec.seq_id] * 2 and not any(u.forks for u in chunks)
    assert (last.seq_id, last.num_computed, len(last.block_ids), last.tokens) == (spec.seq_id, 70, 3, ())
    assert [f.tokens[0].token_id for f in last.forks] == [tokens[0] for tokens in expected]
    assert engine.load().running == 1
    engine.finish(spec.seq_id)
    assert_no_leaks(engine)


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [1, 3], [2]])
def test_a_prompt_that_arrives_is_forked_when_it_joins(llama: Transformer, length: int, wanted: list[int]) -> None:
    spec = together(length, 20)
    expected = singly(llama, spec)
    source, target = make_engine(llama), make_engine(llama)
    prefill = replace(together(length, 20, purpose=Purpose.PREFILL), forks=spec.forks)
    source.add(prefill)
    [update] = drain(source)
    reservation = target.lending.reserve(spec)
    assert reservation is not None and target.load().running == 4
    target.runner.pool.raw[list(reservation.block_ids)] = source.runner.pool.raw[list(update.block_ids)]
    target.lending.commit(reservation, 0, len(reservation.block_ids), spec.block_hashes)
    firsts = {spec.forks[i].seq_id: expected[i][0] for i in wanted}
    target.join(reservation, firsts)
    used = target.load().total_blocks - target.load().available_blocks
    assert used == length // 32 + len(wanted) * (length % 32 > 0)
    assert target.load().running == len(wanted)
    updates = drain(target)
    for i in wanted:
        mine = [u for u in updates if u.seq_id == spec.forks[i].seq_id]
        assert [t.token_id for u in mine for t in u.tokens] == expected[i][1:]
    assert_no_leaks(target)
    source.finish(prefill.seq_id)
    assert_no_leaks(source)


def test_lanes_are_promised_to_every_choice_and_given_back(llama: Transformer) -> None:
    engine = make_engine(llama, max_running=6)
    first, second = engine.lending.reserve(together(40, 5)), engine.lending.reserve(together(41, 5))
    assert first is not None and second is None
    engine.lending.forfeit(first)
    third = engine.lending.reserve(together(40, 5, n=8))  # more than there can ever be: they will take turns
    assert third is not None
    engine.lending.forfeit(third)
    assert_no_leaks(engine)


def test_blocks_are_lent_while_one_is_left_for_each_sequence_that_grows(llama: Transformer) -> None:
    """Those that run and those whose KV is on its way; what will never need another block leaves its own to others."""
    engine = make_engine(llama, num_blocks=9)
    engine.add(make_spec(prompt(20), 60))
    step(engine)
    first = engine.lending.reserve(make_spec(prompt(60, 1), 60))
    assert first is not None and engine.load().available_blocks == 6
    assert engine.lending.reserve(make_spec(prompt(100, 2), 60)) is None, "4 blocks and one each for three sequences"
    second = engine.lending.reserve(make_spec(prompt(100, 2), 10))
    assert second is not None and engine.load().available_blocks == 2
    engine.lending.forfeit(first)
    engine.lending.forfeit(second)
    drain(engine)
    assert_no_leaks(engine)


@pytest.mark.parametrize(("priority", "is_lent"), [(0, False), (1, True)])
def test_who_waits_here_for_room_goes_before_prompts_from_elsewhere(llama: Transformer, priority: int, is_lent: bool) -> None:
    """Or a preempted sequence would wait for as long as small ones keep coming."""
    engine = make_engine(llama, num_blocks=8)
    engine.add(make_spec(prompt(100), 100))
    step(engine)
    waiting = make_spec(prompt(120, 1), 20)
    engine.add(waiting)
    step(engine)
    assert engine.load().waiting == 1
    small = replace(make_spec(prompt(10, 2), 5), priority=priority)
    reservation = engine.lending.reserve(small)
    assert (reservation is not None) == is_lent
    if reservation is not None:
        engine.lending.forfeit(reservation)
    assert len(tokens_of(drain(engine), waiting)) == 20
    assert_no_leaks(engine)
