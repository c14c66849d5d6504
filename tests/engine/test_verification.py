"""Drafts make an answer faster or slower and never different, whoever proposes them, whatever happens meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch

from splitfire.core.sampling import SamplingParams, TokenBias
from splitfire.engine import drawing
from splitfire.engine.blocks import BlockState
from splitfire.engine.drafting import Draft, Verified
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.sample import Draw, SampledToken, SampleRow, sample
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.sequence import Purpose, SeqId, Sequence, SequenceSpec
from splitfire.engine.updates import DraftCounts, SequenceUpdate
from tests.checkpoints import PICO, VOCAB, family_configs, save_checkpoint
from tests.engines import GREEDY, assert_no_leaks, drain, load_model, make_engine, make_spec, sampled_of, tokens_of

Answers = dict[SeqId, list[int]]
Guess = Callable[[list[int]], list[int]]  # of what really follows


class Oracle:
    """Knows what follows, and proposes what `guess` makes of it. Checks what the engine tells it."""

    def __init__(self, answers: Answers, guess: Guess) -> None:
        self.answers = answers
        self.guess = guess
        self.open: set[SeqId] = set()
        self.heard: dict[SeqId, list[Verified]] = {}
        self.forgotten: list[SeqId] = []

    def can_skip(self, num_decoding: int) -> bool:
        return False

    def skip(self, num_decoding: int) -> None:
        """Never called."""

    def propose(self, decoding: Seq[Sequence], room: int) -> Mapping[SeqId, Draft]:
        assert room > 0
        drafts = {}
        for sequence in decoding:
            assert sequence.is_decoding and sequence.spec.purpose is Purpose.GENERATE
            following = self.answers.get(sequence.spec.seq_id, [])[sequence.num_output :]
            self.open.add(sequence.spec.seq_id)
            if guess := self.guess(following):
                drafts[sequence.spec.seq_id] = Draft(tuple(guess), "oracle")
        return drafts

    def verified(self, results: Seq[Verified], num_rows: int, duration_s: float) -> None:
        assert num_rows >= sum(1 + (len(r.draft.token_ids) if r.draft else 0) for r in results)
        for result in results:
            drafted = result.draft.token_ids if result.draft else ()
            assert 1 <= len(result.token_ids) <= 1 + len(drafted)
            assert result.token_ids[: result.num_accepted] == drafted[: result.num_accepted]
            assert len(result.token_ids) - result.num_accepted in (0, 1)
            self.heard.setdefault(result.seq_id, []).append(result)

    def forget(self, seq_id: SeqId) -> None:
        self.open.discard(seq_id)
        self.forgotten.append(seq_id)


draw = random.Random(5)


def perfect(following: list[int]) -> list[int]:
    return following[:7]


def wrong(following: list[int]) -> list[int]:
    return [(token + 1) % VOCAB for token in following[:5]]


def noisy(following: list[int]) -> list[int]:
    guess = following[: draw.randrange(12)]
    return [draw.randrange(VOCAB) if draw.random() < 0.2 else token for token in guess]


def too_long(following: list[int]) -> list[int]:
    return [*following, *range(500)]


GUESSES: dict[str, Guess] = {guess.__name__: guess for guess in (perfect, wrong, noisy, too_long)}
SAMPLINGS = {
    "greedy": GREEDY,
    "logprobs": SamplingParams(temperature=0.0, logprobs=3),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, seed=3, logprobs=0),
    "filtered": SamplingParams(temperature=1.3, top_k=40, min_p=0.02, seed=8),
    "penalties": SamplingParams(
        temperature=0.7,
        seed=4,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=(TokenBias(17, 4.0),),
    ),
}


@pytest.fixture(scope="module")
def pico() -> Transformer:
    return load_model(PICO)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """Random weights: its greedy tokens do not repeat."""
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return load_model(path)


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{seed}-{length}")
    return [draw.randrange(VOCAB) for _ in range(length)]


def run(engine: Engine, specs: Seq[SequenceSpec], *, every: int = 1) -> list[SequenceUpdate]:
    """Joins them one after another, `every` steps apart."""
    updates: list[SequenceUpdate] = []
    for spec in specs:
        engine.add(spec)
        for _ in range(every):
            updates += engine.step().updates
            engine.blocks.check()
    return updates + drain(engine)


def same(ours: Seq[SampledToken], plain: Seq[SampledToken]) -> bool:
    """Equal ids; log-probabilities as equal as fp32 is when a product has other shapes."""
    assert [t.token_id for t in ours] == [t.token_id for t in plain]
    for a, b in zip(ours, plain, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert [t.token_id for t in a.top] == [t.token_id for t in b.top]
    return True


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=list(SAMPLINGS))
def test_tokens_are_the_same_with_any_drafts_and_with_none(pico: Transformer, sampling: SamplingParams) -> None:
    def make() -> list[SequenceSpec]:
        return [make_spec(prompt(n, n), 20 + n % 9, sampling=sampling, choice=n) for n in (1, 31, 33, 70)]

    plain = make()
    updates = run(make_engine(pico), plain)
    expected = [sampled_of(updates, spec) for spec in plain]
    for name, guess in GUESSES.items():
        specs = make()
        answers = {s.seq_id: [t.token_id for t in tokens] for s, tokens in zip(specs, expected, strict=True)}
        oracle = Oracle(answers, guess)
        engine = make_engine(pico, speculator=oracle)
        updates = run(engine, specs, every=3)
        for spec, tokens in zip(specs, expected, strict=True):
            assert same(sampled_of(updates, spec), tokens), name
            heard = [i for r in oracle.heard[spec.seq_id] for i in r.token_ids]
            assert heard == answers[spec.seq_id][1:], "everything but the first token was decoded"
        assert sorted(oracle.forgotten) == sorted(s.seq_id for s in specs) and not oracle.open
        assert_no_leaks(engine)
        counts = engine.draft_counts()["oracle"]
        assert counts == DraftCounts(sum(u.num_drafted for u in updates), sum(u.num_accepted for u in updates))
        if name in ("perfect", "too_long"):
            assert counts.num_accepted == counts.num_drafted > 0
        assert counts.num_accepted == 0 or name != "wrong"


def test_perfect_drafts_save_steps_and_wrong_ones_cost_none(pico: Transformer) -> None:
    def steps(guess: Guess) -> int:
        spec = make_spec(prompt(20), 41)
        answers = {spec.seq_id: tokens_of(run(make_engine(pico), [spec]), spec)}
        return len(run(make_engine(pico, speculator=Oracle(answers, guess)), [spec]))

    assert steps(lambda following: []) == steps(wrong) == 41
    assert steps(perfect) == 1 + 40 // 8
    assert steps(too_long) == 2


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_preemption_and_drafts_together_change_nothing(pico: Transformer, sampling: str) -> None:
    specs = [make_spec(prompt(60, i), 50, sampling=SAMPLINGS[sampling]) for i in range(4)]
    updates = run(make_engine(pico, num_blocks=64), specs)
    answers = {spec.seq_id: tokens_of(updates, spec) for spec in specs}
    for guess in (perfect, wrong, noisy):
        tight = make_engine(pico, num_blocks=9, speculator=Oracle(answers, guess))
        updates = run(tight, specs, every=0)
        assert tight._scheduler.num_preemptions > 0
        for spec in specs:
            assert tokens_of(updates, spec) == answers[spec.seq_id]
        assert_no_leaks(tight)


def test_drafts_preempt_nobody(pico: Transformer) -> None:
    """Four sequences fill the pool to the last block; drafts of any length change nothing about who is preempted, and when."""
    specs = [make_spec(prompt(60, i), 30) for i in range(4)]
    updates = run(make_engine(pico, num_blocks=64), specs)
    answers = {spec.seq_id: tokens_of(updates, spec) for spec in specs}
    counts = []
    for guess in (lambda following: [], lambda following: wrong(following) * 40):
        engine = make_engine(pico, num_blocks=12, speculator=Oracle(answers, guess))
        assert len(run(engine, specs)) == 120
        counts.append(engine._scheduler.num_preemptions)
    assert counts[0] == counts[1]


def test_blocks_taken_for_wrong_drafts_go_back_at_once(pico: Transformer) -> None:
    spec = make_spec(prompt(60), 300)
    engine = make_engine(pico, speculator=Oracle({spec.seq_id: [0] * 300}, lambda following: [VOCAB - 1] * 200))
    engine.add(spec)
    for _ in range(10):
        result = engine.step()
    assert result.num_rows == 201
    assert engine.load().total_blocks - engine.load().available_blocks == 3  # 60 and 10 tokens
    engine.finish(spec.seq_id)
    assert_no_leaks(engine)


def test_stop_tokens_among_drafts_end_the_sequence_there(pico: Transformer) -> None:
    free = make_spec(prompt(20), 24)
    tokens = tokens_of(run(make_engine(pico), [free]), free)
    for at in (1, 4, 5, 9):
        end = tokens.index(tokens[at]) + 1
        spec = make_spec(prompt(20), 24, stop=frozenset({tokens[at]}))
        oracle = Oracle({spec.seq_id: tokens}, too_long)
        engine = make_engine(pico, speculator=oracle)
        updates = run(engine, [spec])
        assert tokens_of(updates, spec) == tokens[:end]
        assert updates[-1].stopped and updates[-1].is_finished
        assert sum(u.num_accepted for u in updates) == end - 1, "what comes after the stop token counts for nothing"
        assert_no_leaks(engine)


def test_min_tokens_hold_inside_a_run_of_drafts(llama: Transformer) -> None:
    """Also for the rows of one step: the stop token counts from the very row where it may."""
    free = make_spec(prompt(20), 24)
    tokens = tokens_of(run(make_engine(llama), [free]), free)
    for at, min_tokens in ((6, 4), (6, 6), (6, 7), (3, 9)):
        stop = frozenset({tokens[at]})
        assert tokens.index(tokens[at]) == at
        plain, drafted = (make_spec(prompt(20), 24, stop=stop, min_tokens=min_tokens) for _ in range(2))
        expected = tokens_of(run(make_engine(llama), [plain]), plain)
        assert (expected == tokens[: at + 1]) == (at >= min_tokens)
        for guess in GUESSES.values():
            engine = make_engine(llama, speculator=Oracle({drafted.seq_id: expected}, guess))
            assert tokens_of(run(engine, [drafted]), drafted) == expected


def test_kv_of_rejected_drafts_is_never_shared(pico: Transformer) -> None:
    """Every block that is left in the cache holds what a computation without drafts would have written."""
    specs = [make_spec(prompt(40, i), 100) for i in range(2)]
    updates = run(make_engine(pico), specs)
    answers = {spec.seq_id: tokens_of(updates, spec) for spec in specs}
    engine = make_engine(pico, speculator=Oracle(answers, noisy))
    run(engine, specs)
    assert engine.blocks.counts()[BlockState.CACHED] == 8
    for spec in specs:
        text = [*spec.prompt, *answers[spec.seq_id]]
        again, fresh = make_spec(text, 5), make_spec(text, 5)
        updates = run(engine, [again])
        assert updates[0].num_cached == 128
        assert same(sampled_of(updates, again), sampled_of(run(make_engine(pico), [fresh]), fresh))
        cached, local = (e.blocks.match(again.block_hashes[:4]) for e in (engine, plain_cache(pico, text)))
        assert len(cached) == 4
        torch.testing.assert_close(
            engine.runner.pool.elements[cached], plain_cache(pico, text).runner.pool.elements[local], rtol=1e-3, atol=1e-4
        )
        engine.blocks.release(cached)


def plain_cache(model: Transformer, text: list[int]) -> Engine:
    engine = make_engine(model)
    run(engine, [make_spec(text, 1)])
    return engine


@pytest.mark.parametrize("at", [8, 11], ids=["in the first row of a step", "after three drafts"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.2, seed=2)], ids=["greedy", "sampled"])
def test_nan_in_a_row_that_counts_fails_the_sequence_after_the_tokens_before_it(
    llama: Transformer, monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams, at: int
) -> None:
    spec, mate = make_spec(prompt(30), 20, sampling=sampling), make_spec(prompt(44), 20)
    updates = run(make_engine(llama), [spec, mate])
    answers = {s.seq_id: tokens_of(updates, s) for s in (spec, mate)}
    token = answers[spec.seq_id][at]
    assert token not in (*spec.prompt, *answers[spec.seq_id][:at], *mate.prompt, *answers[mate.seq_id])
    poison_token(llama, monkeypatch, token)
    engine = make_engine(llama, speculator=Oracle(answers, perfect))
    updates = run(engine, [mate, spec])
    [failed] = [u for u in updates if u.error]
    assert (failed.seq_id, failed.error, failed.tokens) == (spec.seq_id, "nonfinite_logits", ())
    assert tokens_of(updates, spec) == answers[spec.seq_id][: at + 1]
    assert tokens_of(updates, mate) == answers[mate.seq_id]
    assert_no_leaks(engine)


def test_nan_behind_a_wrong_draft_does_not_matter(pico: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that its KV is not finite: the rows that count never see it, and it is written over."""
    spec = make_spec(prompt(30), 40)
    answers = {spec.seq_id: tokens_of(run(make_engine(pico), [spec]), spec)}
    bad = next(t for t in range(VOCAB) if t not in (*spec.prompt, *answers[spec.seq_id]))
    poison_token(pico, monkeypatch, bad)

    def guess(following: list[int]) -> list[int]:
        return [*following[:2], bad, bad, *following[4:6]]

    engine = make_engine(pico, speculator=Oracle(answers, guess))
    assert tokens_of(run(engine, [spec]), spec) == answers[spec.seq_id]
    assert engine.draft_counts()["oracle"].num_accepted > 20


def poison_token(model: Transformer, monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """A weight of this token is NaN: all that is computed from it is."""
    assert isinstance(model.weights.embed, torch.Tensor)
    embed = model.weights.embed.clone()
    embed[token, 0] = float("nan")
    monkeypatch.setattr(model, "weights", replace(model.weights, embed=embed))  # the head keeps its own


def test_a_request_that_cannot_be_sampled_after_a_draft_fails_there(pico: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """F22 with speculation: the exception of one row is that sequence's, after the tokens before it."""
    spec, mate = make_spec(prompt(30), 20, choice=77, sampling=SAMPLINGS["sampled"]), make_spec(prompt(44), 20)
    updates = run(make_engine(pico), [spec, mate])
    answers = {s.seq_id: tokens_of(updates, s) for s in (spec, mate)}

    def poisoned(logits: torch.Tensor, rows: list[SampleRow], draw: Draw) -> list[SampledToken]:
        if any(row.choice == 77 and row.position == 41 for row in rows):
            raise ZeroDivisionError("poison")
        return sample(logits, rows, draw)

    monkeypatch.setattr(drawing, "sample", poisoned)
    engine = make_engine(pico, speculator=Oracle(answers, perfect))
    updates = run(engine, [mate, spec])
    assert [(u.seq_id, u.error) for u in updates if u.error] == [(spec.seq_id, "sampling_failed")]
    assert tokens_of(updates, spec) == answers[spec.seq_id][:11]
    assert tokens_of(updates, mate) == answers[mate.seq_id]
    assert_no_leaks(engine)


def test_a_sequence_that_joins_enters_with_drafts(pico: Transformer) -> None:
    """Its first step here has the batch's verify shape."""
    spec = make_spec(prompt(50), 20)
    answers = {spec.seq_id: tokens_of(run(make_engine(pico), [spec]), spec)}
    engine = make_engine(pico, speculator=Oracle(answers, perfect))
    source = make_engine(pico)
    prefill = make_spec(prompt(50), 20, purpose=Purpose.PREFILL)
    [update] = run(source, [prefill])
    reservation = engine.lending.reserve(spec)
    assert reservation is not None
    engine.runner.pool.elements[list(reservation.block_ids)] = source.runner.pool.elements[list(update.block_ids)]
    engine.lending.commit(reservation, 0, len(reservation.block_ids), spec.block_hashes)
    engine.join(reservation, {spec.seq_id: update.tokens[0].token_id})
    result = engine.step()
    assert result.num_rows == 8
    assert [t.token_id for t in result.updates[0].tokens] == answers[spec.seq_id][1:9]
    engine.finish(spec.seq_id)
    assert_no_leaks(engine)


def test_prompts_get_what_they_got_without_drafts(pico: Transformer) -> None:
    """And the rows of a step are bounded."""
    decoding, long = make_spec(prompt(20), 60), make_spec(prompt(300), 2)
    answers = {decoding.seq_id: tokens_of(run(make_engine(pico), [decoding]), decoding), long.seq_id: []}
    engine = make_engine(pico, chunk_tokens=64, max_running=16, speculator=Oracle(answers, too_long))
    plain = make_engine(pico, chunk_tokens=64, max_running=16)
    chunks = []
    for each in (plain, engine):
        each.add(decoding)
        each.step()
        each.add(long)
        result = each.step()
        assert result.num_rows <= 64 + 16
        chunks.append([u.num_computed for u in result.updates if u.seq_id == long.seq_id])
    assert chunks[0] == chunks[1] == [32]
    assert len(result.updates[0].tokens) > 10
