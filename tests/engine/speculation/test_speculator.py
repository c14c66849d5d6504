"""Whoever drafts, however much: the tokens are those of an engine that does not speculate (P11), and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest

from splitfire.core.sampling import SamplingParams
from splitfire.engine.drafting import Verified
from splitfire.engine.engine import Engine
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.sequence import Fork, Purpose, SeqId, Sequence, SequenceSpec
from splitfire.engine.speculation.controller import Controller
from splitfire.engine.speculation.costs import CostPoint, StepCosts
from splitfire.engine.speculation.draft_model import DraftModel
from splitfire.engine.speculation.speculator import CATCH_UP_TOKENS, BatchSpeculator, Sources
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import PICO, VOCAB
from tests.engine.speculation.rig import CHEAP_ROWS, Always, let_time_pass, make_draft_model, make_speculator
from tests.engines import GREEDY, assert_no_leaks, drain, load_model, make_engine, make_spec, tokens_of
from tests.grammars import REGEX, compiled

draw = random.Random(3)
LOOP = [draw.randrange(VOCAB) for _ in range(12)] * 4
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.8, top_p=0.95, seed=3),
    "penalties": SamplingParams(temperature=0.7, seed=4, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=1),
}


@pytest.fixture(scope="module")
def pico() -> Transformer:
    return load_model(PICO)


@pytest.fixture(scope="module")
def pico_draft() -> Transformer:
    return load_model(PICO.parent / "pico-draft")


def edited(tokens: Seq[int]) -> tuple[int, ...]:
    """Resembles the answer: a token replaced, two inserted, three left out."""
    return (*tokens[:6], 7, *tokens[7:13], 8, 9, *tokens[13:20], *tokens[23:])


def specs_of(sampling: SamplingParams, answers: Seq[Seq[int]] = ()) -> list[SequenceSpec]:
    """Three requests; with their answers known, as predicted outputs that are nearly right."""
    made = [make_spec(LOOP[n : n + 40 + n], 24 + n, sampling=sampling, choice=n) for n in (0, 1, 2)]
    return [replace(spec, predicted=edited(answer)) for spec, answer in zip(made, answers, strict=True)] if answers else made


def run(engine: Engine, specs: Seq[SequenceSpec], every: int = 2) -> list[SequenceUpdate]:
    updates: list[SequenceUpdate] = []
    for spec in specs:
        engine.add(spec)
        for _ in range(every):
            updates += engine.step().updates
    return updates + drain(engine)


NONE = Sources(lookup=False, predicted=False)


def speculators(draft: Transformer) -> dict[str, BatchSpeculator]:
    """Every drafter alone at any width, all of them with the controller, and none."""
    return {
        "lookup": make_speculator(Always(), sources=Sources(predicted=False)),
        "predicted": make_speculator(Always(), sources=Sources(lookup=False)),
        "model": make_speculator(Always(), sources=NONE, draft_model=make_draft_model(draft)),
        "all": make_speculator(draft_model=make_draft_model(draft)),
        "nobody": make_speculator(sources=NONE),
    }


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_tokens_are_the_same_with_every_drafter(
    pico: Transformer, pico_draft: Transformer, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = specs_of(sampling)
    updates = run(make_engine(pico), plain)
    answers = [tokens_of(updates, spec) for spec in plain]
    for name, speculator in speculators(pico_draft).items():
        specs = specs_of(sampling, answers)
        engine = make_engine(pico, speculator=speculator)
        let_time_pass(engine, monkeypatch)
        updates = run(engine, specs)
        assert [tokens_of(updates, spec) for spec in specs] == answers, name
        counts = engine.draft_counts()
        assert name not in ("predicted", "model") or counts[name].num_accepted > 0
        assert name != "all" or sum(c.num_accepted for c in counts.values()) > 10
        assert name != "nobody" or counts == {}
        assert not speculator.num_followed, name
        assert_no_leaks(engine)


def test_lookup_finds_what_repeats(pico: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers of a small model fall into loops; steps are saved."""
    spec = make_spec(LOOP * 4, 48)
    plain = run(make_engine(pico), [spec])
    engine = make_engine(pico, speculator=make_speculator())
    let_time_pass(engine, monkeypatch)
    updates = run(engine, [spec])
    assert tokens_of(updates, spec) == tokens_of(plain, spec)
    assert len(updates) + engine.draft_counts()["lookup"].num_accepted == len(plain)
    assert len(updates) < len(plain) - 8


def test_preemption_changes_nothing(pico: Transformer, pico_draft: Transformer) -> None:
    """Blocks are taken away in the middle of drafting, given back, and the same tokens come."""
    specs = [make_spec(LOOP[i : i + 40], 80, sampling=SAMPLINGS["sampled"]) for i in range(3)]
    updates = run(make_engine(pico), specs)
    answers = [tokens_of(updates, spec) for spec in specs]
    specs = [replace(spec, predicted=edited(answer)) for spec, answer in zip(specs, answers, strict=True)]
    for speculator in (
        make_speculator(Always(9)),
        make_speculator(Always(3), sources=NONE, draft_model=make_draft_model(pico_draft)),
    ):
        engine = make_engine(pico, num_blocks=6, speculator=speculator)
        updates = run(engine, specs, every=0)
        assert engine._scheduler.num_preemptions > 0
        assert [tokens_of(updates, spec) for spec in specs] == answers
        assert_no_leaks(engine)


def test_choices_and_grammars_draft_like_others(pico: Transformer, pico_draft: Transformer) -> None:
    """Forks of one prompt, each followed by itself; and a grammar, which cuts what it does not allow from any draft."""
    grammar = compiled(REGEX, "(ab|ba|x[0-9]y){20,60}")
    forks = tuple(Fork(SeqId(5_000_000 + choice), choice) for choice in range(3))
    asked = [
        replace(make_spec(LOOP, 20, sampling=SAMPLINGS["sampled"]), forks=forks),
        replace(make_spec(LOOP, 24, sampling=SAMPLINGS["sampled"]), grammar=grammar),
    ]
    specs = [*(asked[0].alone(fork) for fork in forks), asked[1]]
    updates = run(make_engine(pico), asked)
    answers = [tokens_of(updates, spec) for spec in specs]
    asked = [replace(spec, predicted=edited(answer)) for spec, answer in zip(asked, (answers[1], answers[3]), strict=True)]
    for speculator in (
        make_speculator(Always()),
        make_speculator(Always(4), sources=NONE, draft_model=make_draft_model(pico_draft)),
    ):
        engine = make_engine(pico, speculator=speculator)
        updates = run(engine, asked)
        assert [tokens_of(updates, spec) for spec in specs] == answers
        assert sum(u.num_accepted for u in updates) > 0
        assert speculator.num_followed == 0
        assert_no_leaks(engine)


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_a_preempted_request_resumed_on_another_worker_with_a_cached_prefix_gets_the_same_tokens(
    pico: Transformer, pico_draft: Transformer, sampling: str
) -> None:
    """F80: preempted there, resumed here with the ids streamed so far, its prompt half in the cache, all drafters at work."""
    spec = make_spec(LOOP, 60, sampling=SAMPLINGS[sampling])
    answer = tokens_of(run(make_engine(pico), [spec]), spec)
    spec = replace(spec, predicted=edited(answer))
    rival = make_spec(LOOP[5:], 60, sampling=SAMPLINGS[sampling])

    def speculator() -> BatchSpeculator:
        return make_speculator(Always(3), draft_model=make_draft_model(pico_draft))

    first = make_engine(pico, num_blocks=6, speculator=speculator())
    updates: list[SequenceUpdate] = []
    for each in (rival, spec):
        first.add(each)
    while first._scheduler.num_preemptions == 0:
        assert first.has_work
        updates += first.step().updates
    streamed = tokens_of(updates, spec)
    assert 0 < len(streamed) < 60
    first.finish(spec.seq_id)
    second = make_engine(pico, speculator=speculator())
    run(second, [make_spec(LOOP[:40], 2)])
    resumed = make_spec(LOOP, 60, sampling=SAMPLINGS[sampling], output=streamed)
    updates = run(second, [replace(resumed, predicted=spec.predicted)])
    assert updates[0].num_cached == 32
    assert streamed + tokens_of(updates, resumed) == answer
    assert_no_leaks(second)


def test_the_draft_model_catches_up_after_a_hand_off_beside_the_steps(
    pico: Transformer, pico_draft: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its KV of the prompt did not travel: it is computed in pieces, and drafts come when it is complete."""
    spec = make_spec((LOOP * 9)[:400], 80)
    answer = tokens_of(run(make_engine(pico), [spec]), spec)
    source = make_engine(pico)
    source.add(replace(spec, purpose=Purpose.PREFILL))
    [update] = source.step().updates
    model = make_draft_model(pico_draft)
    pieces: list[int] = []
    catch_up = model.catch_up

    def counted(targets: Seq[Sequence], num_tokens: int) -> None:
        pieces.append(num_tokens)
        catch_up(targets, num_tokens)

    monkeypatch.setattr(model, "catch_up", counted)
    costs = StepCosts([CostPoint(1, 1, 0.01), CostPoint(1, 9, 0.0104)], [CostPoint(1, 1, 0.0001), CostPoint(64, 64, 0.005)])
    engine = make_engine(pico, speculator=make_speculator(Controller(costs), sources=NONE, draft_model=model))
    let_time_pass(engine, monkeypatch)
    reservation = engine.lending.reserve(spec)
    assert reservation is not None
    engine.runner.pool.elements[list(reservation.block_ids)] = source.runner.pool.elements[list(update.block_ids)]
    engine.lending.commit(reservation, 0, len(reservation.block_ids), spec.block_hashes)
    engine.join(reservation, {reservation.spec.seq_id: update.tokens[0].token_id})
    updates = drain(engine)
    assert [update.tokens[0].token_id, *(t.token_id for u in updates for t in u.tokens)] == answer
    assert len(pieces) > 3 and max(pieces) <= 100, "half a step's worth at a time"
    assert engine.draft_counts()["model"].num_drafted > 0
    assert model.num_mirrors == 0 and model.blocks.num_available == model.blocks.num_blocks


def drafts_of(model: DraftModel, target: Sequence, width: int) -> tuple[int, ...]:
    return model.draft([target], {target.spec.seq_id: width}).get(target.spec.seq_id, ())


def fresh_drafts(draft: Transformer, target: Sequence, width: int) -> tuple[int, ...]:
    model = make_draft_model(draft)
    model.catch_up([target], 10_000)
    return drafts_of(model, target, width)


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_a_mirror_that_was_wrong_drafts_what_a_new_one_would(pico_draft: Transformer, sampling: str) -> None:
    """Rejected in whole, in part, accepted, or not asked for a while: KV of what was not so is never used."""
    model = make_draft_model(pico_draft)
    target = Sequence(make_spec(LOOP, 100, sampling=SAMPLINGS[sampling]), 0, 32)
    target.tokens.append(5)
    model.catch_up([target], 10_000)
    for step in range(12):
        drafted = drafts_of(model, target, 4)
        assert len(drafted) == 4
        assert drafted == fresh_drafts(pico_draft, target, 4), f"step {step}"
        if step == 5:
            continue  # the step was not for this sequence: nothing was verified
        keep = draw.randrange(5)
        target.tokens += (*drafted[:keep], draw.randrange(VOCAB))
        if step % 4 == 3:
            target.tokens += [draw.randrange(VOCAB) for _ in range(draw.randrange(3, 12))]
    model.forget(target.spec.seq_id)
    assert model.blocks.num_available == model.blocks.num_blocks


def test_a_model_like_the_target_is_always_right_also_when_sampling(pico: Transformer) -> None:
    """It draws with the same noise (Gumbel coupling): the same distribution gives the same tokens."""
    spec = make_spec(LOOP, 33, sampling=SAMPLINGS["sampled"])
    model = make_draft_model(pico)
    engine = make_engine(pico, speculator=make_speculator(Always(7), sources=NONE, draft_model=model))
    updates = run(engine, [spec])
    counts = engine.draft_counts()["model"]
    assert counts.num_accepted == counts.num_drafted > 20
    assert len(updates) < 10


def test_sequences_the_draft_pool_has_no_room_for_go_on_without(pico: Transformer, pico_draft: Transformer) -> None:
    specs = [make_spec(LOOP[:40], 30 + 20 * i) for i in range(3)]
    updates = run(make_engine(pico), specs)
    answers = [tokens_of(updates, spec) for spec in specs]
    model = make_draft_model(pico_draft, num_blocks=4)
    engine = make_engine(pico, speculator=make_speculator(Always(3), sources=NONE, draft_model=model))
    updates = run(engine, specs)
    assert [tokens_of(updates, spec) for spec in specs] == answers
    helped = {u.seq_id for u in updates if u.num_drafted}
    assert specs[0].seq_id in helped
    assert model.num_mirrors == 0 and model.blocks.num_available == 4
    assert_no_leaks(engine)


def test_a_sequence_longer_than_the_draft_models_context_goes_on_without(pico: Transformer, pico_draft: Transformer) -> None:
    spec = make_spec(LOOP[:40], 40)
    answer = tokens_of(run(make_engine(pico), [spec]), spec)
    model = make_draft_model(pico_draft, context=60)
    engine = make_engine(pico, speculator=make_speculator(Always(3), sources=NONE, draft_model=model))
    updates = run(engine, [spec])
    assert tokens_of(updates, spec) == answer
    assert sum(u.num_drafted for u in updates if u.offset > 22) == 0 < sum(u.num_drafted for u in updates)


def test_a_model_that_is_never_right_is_left_alone_and_tried_again(pico: Transformer) -> None:
    """Its acceptance is nothing: soon no drafts, and after a while a few more, to see."""
    costs = StepCosts([CostPoint(1, 1, 0.01), CostPoint(1, 9, 0.012)], [CostPoint(1, 1, 0.001), CostPoint(64, 64, 0.01)])

    class Wrong(DraftModel):
        def draft(self, targets: Seq[Sequence], widths: object) -> dict[SeqId, tuple[int, ...]]:
            return {t.spec.seq_id: (VOCAB - 1,) for t in targets}

        def num_missing(self, target: Sequence) -> int:
            return 0

    model = make_draft_model(pico, num_blocks=1)
    model.__class__ = Wrong
    speculator = make_speculator(Controller(costs), sources=NONE, draft_model=model)
    target = Sequence(make_spec(LOOP, 10_000), 0, 32)
    asked = []
    for _ in range(1500):
        drafts = speculator.propose([target], 100)
        target.tokens.append(draw.randrange(VOCAB - 1))
        draft = drafts.get(target.spec.seq_id)
        asked.append(draft is not None)
        took = 0.01 + 0.001 * (draft is not None)
        speculator.verified([Verified(target.spec.seq_id, draft, 0, (target.tokens[-1],))], 1 + (draft is not None), took)
    assert sum(asked[:50]) >= 1
    assert 1 <= sum(asked[300:]) <= 40


def test_indexes_that_are_behind_catch_up_a_piece_a_step(pico: Transformer) -> None:
    spec = make_spec([draw.randrange(VOCAB) for _ in range(3 * CATCH_UP_TOKENS)], 10)
    sequence = Sequence(spec, 0, 32)
    speculator = make_speculator()
    for step in range(1, 4):
        speculator.propose([sequence], 100)
        assert speculator._followed[spec.seq_id].drafters[0].num_seen == step * CATCH_UP_TOKENS


def test_where_nothing_can_pay_nothing_is_looked_at() -> None:
    sequence = Sequence(make_spec(LOOP, 10), 0, 32)
    speculator = make_speculator(Controller(StepCosts([CostPoint(1, 1, 1.0), CostPoint(1, 2, 2.0)])))
    assert speculator.propose([sequence], 100) == {}
    assert speculator.num_followed == 0
    assert make_speculator(Controller(CHEAP_ROWS)).propose([sequence], 100)
