"""Grammars: a model that knows nothing answers in shape, and nothing but the shape changes with them, however tokens are made."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from splitfire.core import limits
from splitfire.core.sampling import SamplingParams
from splitfire.engine.constraint import Constraint, ConstraintFailed, Mask, allowed
from splitfire.engine.grammar import CompiledGrammar
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.sequence import SequenceSpec
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import PICO, VOCAB
from tests.engine.test_verification import GUESSES, Oracle
from tests.engines import GREEDY, assert_no_leaks, drain, load_model, make_engine, make_spec, sampled_of, tokens_of
from tests.grammars import ARITHMETIC, EOS, GRAMMAR, PERSON, REGEX, SCHEMA, SMALL, compiled, is_person, regex

PROMPT = tuple(range(300, 340))


@pytest.fixture(scope="module")
def pico() -> Transformer:
    return load_model(PICO)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PICO / "tokenizer.json"))


def ids_of(mask: Mask) -> set[int]:
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def spec_of(grammar: CompiledGrammar | None, max_tokens: int = 400, *, seed: int = 0, **changes: Any) -> SequenceSpec:
    changes.setdefault("sampling", SamplingParams(temperature=1.0, seed=seed))
    return replace(make_spec(PROMPT, max_tokens, stop=EOS, **changes), grammar=grammar)


def run(model: Transformer, specs: Seq[SequenceSpec], **options: Any) -> list[SequenceUpdate]:
    engine = make_engine(model, **options)
    for spec in specs:
        engine.add(spec)
    updates = drain(engine)
    assert_no_leaks(engine)
    return updates


def last(updates: Seq[SequenceUpdate], spec: SequenceSpec) -> SequenceUpdate:
    return [u for u in updates if u.seq_id == spec.seq_id][-1]


# -- one sequence's grammar, without a model


def test_what_may_come_is_what_the_grammar_says(tokenizer: Tokenizer) -> None:
    state = regex("[ab]{2}c?")
    for _ in range(2):
        assert {tokenizer.decode([i])[:1] for i in ids_of(state.mask())} == {"a", "b"}
        state.advance(encode(tokenizer, "a")[0])
    assert ids_of(state.mask()) == {*EOS, *encode(tokenizer, "c")}, "it may end or go on"
    state.advance(encode(tokenizer, "c")[0])
    assert state.is_over
    with pytest.raises(ConstraintFailed):
        state.mask()


def test_the_end_is_only_allowed_where_it_ends_the_sequence() -> None:
    """With ignore_eos an end-of-sequence token would be one more token, of no grammar."""
    grammar = compiled(REGEX, "(ab)*")
    assert ids_of(grammar.start((), EOS).mask()) >= EOS
    assert not ids_of(grammar.start((), frozenset()).mask()) & EOS
    one = next(iter(EOS))
    assert ids_of(grammar.start((), frozenset({one})).mask()) & EOS == {one}


def test_drafts_are_valid_as_far_as_the_grammar_goes(tokenizer: Tokenizer) -> None:
    state = regex("[0-9]{1,9}-x")
    ids = encode(tokenizer, "12-x")
    wrong = encode(tokenizer, "y")
    assert state.num_valid(ids) == len(ids)
    assert state.num_valid([*ids[:-1], *wrong, *ids]) == len(ids) - 1
    assert state.num_valid([*ids, *ids]) == len(ids), "nothing after the end"
    assert state.num_valid(wrong) == 0
    assert compiled(REGEX, "a*").start((), frozenset()).num_valid([*EOS]) == 0
    before = ids_of(state.mask())
    assert ids_of(state.mask()) == before, "looking at drafts changes nothing"


def test_it_is_a_function_of_the_output(tokenizer: Tokenizer) -> None:
    grammar = compiled(SCHEMA, PERSON)
    ids = encode(tokenizer, json.dumps({"name": "Bo", "age": 5, "kind": "cat", "tags": ["a"], "at": {"ok": True}}))
    follower = grammar.start((), EOS)
    for i, token in enumerate(ids):
        assert ids_of(follower.mask()) == ids_of(grammar.start(ids[:i], EOS).mask()), i
        assert ids_of(follower.mask()) == ids_of(grammar.after(ids[: i // 2]).after(ids[:i]).start(ids[:i], EOS).mask()), i
        follower.advance(token)
    assert follower.is_over and grammar.start(ids, EOS).is_over and grammar.after(ids).start(ids, EOS).is_over


def test_tokens_that_are_not_of_the_grammar_fail_it(tokenizer: Tokenizer) -> None:
    state = regex("abc")
    state.advance(encode(tokenizer, "x")[0])
    assert state.num_valid(encode(tokenizer, "abc")) == 0
    with pytest.raises(ConstraintFailed, match="constraint_broken"):
        state.mask()
    resumed = compiled(REGEX, "abc").after(encode(tokenizer, "abx"))
    with pytest.raises(ConstraintFailed, match="constraint_broken"):
        resumed.start(encode(tokenizer, "abx"), EOS).mask()


def test_nothing_left_beside_blocked_tokens_is_a_dead_end(tokenizer: Tokenizer) -> None:
    state = regex("a|b")
    both = ids_of(state.mask())
    assert ids_of(allowed(state, frozenset({min(both)}))) == both - {min(both)}
    with pytest.raises(ConstraintFailed, match="constraint_dead_end"):
        allowed(state, frozenset(both))
    assert ids_of(state.mask()) == both


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GRAMMAR, 'root ::= root root | "a" | "aa" | ""'),
        (GRAMMAR, 'root ::= x x x x\nx ::= root | "a" | "" | x "a"'),
        (REGEX, "(a{1,1000}){1,1000}"),
        (REGEX, "(a|aa|aaa){0,3000}b{5,3000}"),
    ],
)
def test_a_grammar_made_to_be_slow_costs_its_own_sequence_and_little_time(kind: Any, source: str, tokenizer: Tokenizer) -> None:
    """Steps stay short until its bounds end it; the whole worker waits for each of them."""
    state, token = compiled(kind, source).start((), EOS), encode(tokenizer, "a")[0]
    slowest, reason = 0.0, ""
    for _ in range(200):
        began = time.thread_time()
        try:
            state.mask()
        except ConstraintFailed as exc:
            reason = exc.reason
            break
        state.advance(token)
        slowest = max(slowest, time.thread_time() - began)
    assert reason in ("", "constraint_too_complex")
    assert slowest < 5 * limits.MAX_MASK_S


def test_a_step_over_its_processor_time_ends_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = regex("a*"), regex("a*")
    fast.mask()
    monkeypatch.setattr(limits, "MAX_MASK_S", -1.0)
    with pytest.raises(ConstraintFailed, match="constraint_too_complex"):
        slow.mask()


def test_a_sequence_over_its_processor_time_ends(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """No token takes long, but all of them together do."""
    monkeypatch.setattr(limits, "MASK_BURST_S", 0.005)
    monkeypatch.setattr(limits, "MEAN_MASK_S", 0.0)
    state, token = regex("(a|b|aa|ab)*"), encode(tokenizer, "a")[0]
    with pytest.raises(ConstraintFailed, match="constraint_too_complex"):
        for _ in range(5000):
            state.mask()
            state.advance(token)


def test_one_sequence_does_not_use_up_what_another_may_learn(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's copies share their lexer and its bounds, so every job builds its own."""
    monkeypatch.setattr(limits, "MAX_LEXER_STATES", 300)
    source = r"([a-z]{3,7}[0-9]?){0,2000}x{5,400}|[\s\S]{0,5000}y"

    def exhaust(state: Constraint) -> int:
        draw = random.Random(1)
        for count in range(1000):
            try:
                state.advance(draw.choice(sorted(ids_of(state.mask()) - EOS)))
            except ConstraintFailed:
                return count
        raise AssertionError("the bound is never met")

    first = exhaust(regex(source))
    assert first > 5
    assert exhaust(regex(source)) == first


# -- with a model


def test_a_bad_model_answers_in_the_shape_asked_for(pico: Transformer, tokenizer: Tokenizer) -> None:
    """Temperature 1 and no idea what is asked: the grammar does all the work."""
    specs = [spec_of(compiled(SCHEMA, PERSON), seed=seed) for seed in range(10)]
    dates = [spec_of(compiled(REGEX, r"20[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]|never"), seed=seed) for seed in range(8)]
    sums = [spec_of(compiled(GRAMMAR, ARITHMETIC), 60, seed=seed) for seed in range(8)]
    updates = run(pico, [*specs, *dates, *sums], max_running=32, num_blocks=600)
    texts = {s.seq_id: tokenizer.decode(tokens_of(updates, s)) for s in (*specs, *dates, *sums)}
    for spec in (*specs, *dates):
        assert last(updates, spec).stopped, texts[spec.seq_id]
    assert all(is_person(texts[s.seq_id]) for s in specs)
    assert len({texts[s.seq_id] for s in specs}) == len(specs), "the model still chooses"
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d|never", texts[s.seq_id]) for s in dates)
    ended = [texts[s.seq_id] for s in sums if last(updates, s).stopped]
    assert ended
    for text in ended:
        assert re.fullmatch(r"[0-9+()-]+", text)
        compile(text, "sum", "eval")


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.2, top_k=5, top_p=0.9, min_p=0.02, seed=3)])
def test_filters_choose_among_what_is_allowed(pico: Transformer, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
    spec = spec_of(compiled(REGEX, "[0-9]{3}(,[0-9]{3}){2}"), sampling=sampling)
    assert re.fullmatch(r"\d{3},\d{3},\d{3}", tokenizer.decode(tokens_of(run(pico, [spec]), spec)))


def test_log_probabilities_are_the_models_own(pico: Transformer) -> None:
    free = spec_of(None, 1, sampling=SamplingParams(temperature=0.0, logprobs=20))
    held = spec_of(compiled(REGEX, "[a-z]+"), 1, sampling=SamplingParams(temperature=0.0, logprobs=20))
    updates = run(pico, [free, held])
    [plain], [token] = sampled_of(updates, free), sampled_of(updates, held)
    assert [t.token_id for t in token.top] == [t.token_id for t in plain.top]
    assert [t.logprob for t in token.top] == pytest.approx([t.logprob for t in plain.top], abs=1e-4)
    assert token.logprob is not None and plain.logprob is not None and token.logprob <= plain.logprob


@pytest.mark.parametrize("stop", [EOS, frozenset[int]()])
def test_the_sequence_stops_when_nothing_may_follow(pico: Transformer, tokenizer: Tokenizer, stop: frozenset[int]) -> None:
    """Also with ignore_eos, and before min_tokens: there is nothing else to say."""
    spec = replace(make_spec(PROMPT, 50, stop=stop, min_tokens=30), grammar=compiled(REGEX, "yes|no"))
    updates = run(pico, [spec])
    assert tokenizer.decode(tokens_of(updates, spec)) in ("yes", "no")
    assert last(updates, spec).stopped and last(updates, spec).is_finished


def test_ignore_eos_goes_on_for_as_long_as_the_grammar_does(pico: Transformer) -> None:
    spec = replace(make_spec(PROMPT, 40, stop=frozenset()), grammar=compiled(REGEX, "[a-z ]*"))
    updates = run(pico, [spec])
    assert len(tokens_of(updates, spec)) == 40
    assert not EOS & set(tokens_of(updates, spec))
    assert not last(updates, spec).stopped


def test_batch_mates_never_notice(pico: Transformer) -> None:
    plain = [make_spec(PROMPT[:n], 20, sampling=SamplingParams(seed=n)) for n in (3, 30, 40)]
    alone = [tokens_of(run(pico, [replace(s)]), s) for s in plain]
    held = [spec_of(compiled(SCHEMA, PERSON), 30, seed=1), spec_of(compiled(REGEX, "a{1,9}"), 30)]
    updates = run(pico, [*plain, *held])
    assert [tokens_of(updates, s) for s in plain] == alone


def test_a_grammar_that_comes_to_a_dead_end_fails_alone(pico: Transformer) -> None:
    blocked = frozenset(ids_of(regex("(no|yes){2}").mask()))
    dead = replace(make_spec(PROMPT, 20, stop=blocked, min_tokens=5), grammar=compiled(REGEX, "(no|yes){2}"))
    mate = spec_of(compiled(REGEX, "[0-9]{4}"))
    updates = run(pico, [dead, mate])
    assert last(updates, dead).error == "constraint_dead_end"
    assert tokens_of(updates, dead) == []
    assert not last(updates, mate).error and last(updates, mate).stopped


@pytest.mark.parametrize("guess", GUESSES)
def test_tokens_are_the_same_with_any_drafts(pico: Transformer, guess: str) -> None:
    def make() -> list[SequenceSpec]:
        return [
            spec_of(compiled(SCHEMA, SMALL), 60, seed=4),
            spec_of(compiled(REGEX, "[a-z]{2,9}(, [a-z]{2,9}){3}"), 40, seed=5, choice=1),
            spec_of(compiled(GRAMMAR, ARITHMETIC), 20, sampling=GREEDY),
            spec_of(None, 12, seed=6),
        ]

    plain = make()
    updates = run(pico, plain)
    expected = [tokens_of(updates, s) for s in plain]
    specs = make()
    oracle = Oracle({s.seq_id: tokens for s, tokens in zip(specs, expected, strict=True)}, GUESSES[guess])
    drafted = run(pico, specs, speculator=oracle)
    assert [tokens_of(drafted, s) for s in specs] == expected
    assert [last(drafted, s).stopped for s in specs] == [last(updates, s).stopped for s in plain]
    if guess == "perfect":
        assert len(drafted) < len(updates) / 2, "fewer steps"


def test_drafts_the_grammar_forbids_are_not_even_verified(pico: Transformer) -> None:
    spec = spec_of(compiled(REGEX, "[0-9]{20}"), seed=2)
    expected = tokens_of(run(pico, [spec]), spec)
    again = spec_of(compiled(REGEX, "[0-9]{20}"), seed=2)
    letters = [VOCAB - 1] * 6
    oracle = Oracle({again.seq_id: expected}, lambda following: [*following[:1], *letters])
    updates = run(pico, [again], speculator=oracle)
    assert tokens_of(updates, again) == expected
    assert all(u.num_drafted <= 1 for u in updates)


def test_a_preempted_sequence_goes_on_where_it_was(pico: Transformer) -> None:
    def make() -> list[SequenceSpec]:
        return [spec_of(compiled(REGEX, "([0-9]{1,3},)*x"), 40, seed=seed) for seed in (7, 8, 9)]

    roomy, tight = make(), make()
    updates = run(pico, roomy)
    expected = [tokens_of(updates, s) for s in roomy]
    engine = make_engine(pico, num_blocks=7, block_size=16)
    for spec in tight:
        engine.add(spec)
    updates = drain(engine)
    assert engine._scheduler.num_preemptions > 0
    assert [tokens_of(updates, s) for s in tight] == expected
    assert_no_leaks(engine)


def test_resumed_anywhere_it_goes_on_the_same_way(pico: Transformer) -> None:
    whole = spec_of(compiled(SCHEMA, SMALL), seed=11)
    expected = tokens_of(run(pico, [whole]), whole)
    resumed = [spec_of(compiled(SCHEMA, SMALL), seed=11, output=expected[:n]) for n in range(1, len(expected))]
    updates = run(pico, resumed)
    for spec in resumed:
        assert [*spec.output, *tokens_of(updates, spec)] == expected, len(spec.output)
        assert last(updates, spec).stopped
