"""Jobs wait for their grammar without holding up anybody, and whatever ends the wait leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from splitfire.core import limits
from splitfire.core.errors import Code, InvalidInput, Unsupported
from splitfire.core.response_format import OutputGrammar
from splitfire.core.sampling import SamplingParams
from splitfire.engine.constraint import Constraint, ConstraintFailed, Mask
from splitfire.engine.grammar import CompiledGrammar, GrammarCompiler
from splitfire.engine.sequence import SeqId, SequenceSpec
from splitfire.v1 import fleet_pb2, inference_pb2
from splitfire.worker.grammars import GrammarDesk
from splitfire.worker.job import Job
from tests.checkpoints import PICO, VOCAB
from tests.engine.test_verification import Oracle
from tests.engines import load_model, make_engine, make_spec
from tests.grammars import EOS, REGEX, SCHEMA, SMALL, compiled, compiler, output_grammar
from tests.rig import Answer, Rig, until
from tests.rig import _Replies as Replies

WHOLE = fleet_pb2.PART_WHOLE
STOP = inference_pb2.FINISH_REASON_STOP


def play(scene: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


def job(replies: Replies, attempt: int = 1, spec: SequenceSpec | None = None) -> Job:
    spec = spec or make_spec((1, 2, 3), 10, stop=EOS)
    return Job(replies, attempt, fleet_pb2.PART_WHOLE, spec, None, "", f"r{attempt}", time.monotonic())


class SlowCompiler:
    """Takes as long as it is told to."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.num_begun = 0

    def compile(self, grammar: OutputGrammar) -> CompiledGrammar:
        self.num_begun += 1
        assert self.may_go_on.wait(30)
        return compiler().compile(grammar)


def test_a_job_leaves_with_its_grammar_and_the_loop_never_waits() -> None:
    async def scene() -> None:
        slow = SlowCompiler()
        desk = GrammarDesk(slow)  # type: ignore[arg-type]
        done: list[Job] = []
        began = time.perf_counter()
        for attempt in range(3):
            desk.build(job(Replies({0: Answer(attempt)}), attempt), output_grammar(REGEX, "a+"), done.append)
        assert time.perf_counter() - began < 1.0
        await asyncio.sleep(0.05)
        assert not done and desk.num_jobs == 3
        slow.may_go_on.set()
        await until(lambda: len(done) == 3)
        assert [j.attempt for j in done] == [0, 1, 2]
        assert all(j.spec.grammar is not None for j in done)
        assert len({id(j.spec.grammar) for j in done}) == 3, "one for each job"
        assert desk.num_jobs == 0
        desk.close()

    play(scene)


def test_a_job_cancelled_meanwhile_is_never_heard_of_again() -> None:
    """One attempt, all attempts of a router, and those of another router."""

    async def scene() -> None:
        slow = SlowCompiler()
        desk = GrammarDesk(slow)  # type: ignore[arg-type]
        mine, theirs = Replies({0: Answer(1)}), Replies({0: Answer(2)})
        done: list[Job] = []
        for attempt, replies in ((1, mine), (2, mine), (3, mine), (1, theirs)):
            desk.build(job(replies, attempt), output_grammar(REGEX, "a+"), done.append)
        desk.cancel(mine, 2)
        assert desk.num_jobs == 3
        desk.cancel(mine, None)
        assert desk.num_jobs == 1
        slow.may_go_on.set()
        await until(lambda: bool(done))
        await asyncio.sleep(0.05)
        assert [j.replies for j in done] == [theirs]
        assert not mine.answers[0].refusals and not mine.answers[0].finished
        desk.close()

    play(scene)


def test_what_cannot_be_built_is_refused_and_the_next_is_built() -> None:
    async def scene() -> None:
        desk = GrammarDesk(compiler())
        replies, done = Replies({0: Answer(1)}), list[Job]()
        for text in ("%llguidance {", "start: /(a/", "start: missing", '{"grammars": 5}'):
            desk.build(job(replies), OutputGrammar(REGEX, text), done.append)
        desk.build(job(replies, 2), output_grammar(REGEX, "a"), done.append)
        await until(lambda: bool(done))
        assert [j.attempt for j in done] == [2]
        assert {(r.code, r.reason, r.is_retryable) for r in replies.answers[0].refusals} == {(3, "invalid_response_format", False)}
        assert len(replies.answers[0].refusals) == 4
        with pytest.raises(InvalidInput, match="characters long"):
            desk.build(job(replies), OutputGrammar(REGEX, "a" * (limits.MAX_GRAMMAR_CHARS + 1)), done.append)
        assert desk.num_jobs == 0
        desk.close()

    play(scene)


def test_a_bug_in_building_is_its_own_jobs_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GrammarCompiler, grammar: OutputGrammar) -> CompiledGrammar:
        raise RuntimeError("no")

    async def scene() -> None:
        desk = GrammarDesk(compiler())
        replies = Replies({0: Answer(1)})
        monkeypatch.setattr(GrammarCompiler, "compile", broken)
        desk.build(job(replies), OutputGrammar(REGEX, "x"), lambda job: None)
        await until(lambda: bool(replies.answers[0].refusals))
        assert replies.answers[0].refusals[0].reason == "internal"
        desk.close()

    play(scene)


def test_without_a_tokenizer_that_fits_it_is_refused() -> None:
    async def scene() -> None:
        desk = GrammarDesk(None)
        with pytest.raises(Unsupported):
            desk.build(job(Replies({0: Answer(1)})), output_grammar(REGEX, "a"), lambda job: None)
        desk.close()

    play(scene)


def test_an_answer_that_was_complete_when_its_worker_died_is_finished_not_continued() -> None:
    """Nothing marks the end of a grammar in the ids, so only who knows the grammar can see it."""

    async def scene() -> None:
        grammar = output_grammar(REGEX, "(ab){2}")
        engine = make_engine(load_model(PICO))
        spec = replace(make_spec((1, 2, 3), 10, stop=EOS), grammar=compiler().compile(grammar))
        engine.add(spec)
        ids: list[int] = []
        while engine.has_work:
            ids += [t.token_id for u in engine.step().updates for t in u.tokens]
        desk = GrammarDesk(compiler())
        complete, partial, done = Replies({0: Answer(1)}), Replies({0: Answer(2)}), list[Job]()
        desk.build(job(complete, 1, make_spec((1, 2, 3), 10, stop=EOS, output=ids)), grammar, done.append)
        desk.build(job(partial, 2, make_spec((1, 2, 3), 10, stop=EOS, output=ids[:-1])), grammar, done.append)
        await until(lambda: bool(done))
        assert [j.attempt for j in done] == [2]
        assert [f.reason for f in complete.answers[0].finished] == [STOP]
        assert not partial.answers[0].finished
        desk.close()

    play(scene)


class Everybody(defaultdict[SeqId, list[int]]):
    """The same answer, whoever is asked about."""

    def get(self, key: SeqId, default: object = None) -> list[int]:
        return self[key]

    def __missing__(self, key: SeqId) -> list[int]:
        assert self.default_factory is not None
        return self.default_factory()


def test_split_resumed_or_with_drafts_the_tokens_are_the_same() -> None:
    model = load_model(PICO)
    sampling = SamplingParams(temperature=1.0, seed=21)
    prompt = list(range(200, 280))

    async def scene() -> None:
        oracle = Oracle({}, lambda following: following[:5])
        rig = Rig(make_engine(model, chunk_tokens=48), make_engine(model, num_blocks=256, speculator=oracle))
        for make in (lambda: compiled(SCHEMA, SMALL), lambda: compiled(REGEX, "[a-f]{1,3}(-[a-f]{1,3}){4}")):
            ask = partial(rig.ask, prompt, 200, sampling=sampling, stop=EOS, grammar=make)
            oracle.answers = {}
            whole = ask(part=WHOLE)
            await until(lambda: whole.end is not None)  # noqa: B023
            ids = whole.ids()
            oracle.answers = Everybody(lambda: ids)  # noqa: B023
            split = ask()
            await until(lambda: split.end is not None)  # noqa: B023
            assert split.ids() == ids
            assert split.accepted_draft_tokens > 0
            assert whole.end is not None and split.end is not None
            assert whole.end.reason == split.end.reason == STOP
            resumed = [ask(output=ids[:n]) for n in (1, len(ids) // 2, len(ids) - 1)]
            await until(lambda: all(r.end for r in resumed))  # noqa: B023
            for answer, n in zip(resumed, (1, len(ids) // 2, len(ids) - 1), strict=True):
                assert answer.ids() == ids[n:]
                assert answer.end is not None and answer.end.reason == STOP
        await rig.settle()
        rig.close()

    play(scene)


def test_an_answer_of_one_token_ends_where_it_was_computed() -> None:
    """The first token ends the grammar: prefill says so, and the transfer is withdrawn."""
    model = load_model(PICO)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        answer = rig.ask(list(range(90)), 50, grammar=lambda: compiled(REGEX, "y"))
        await until(lambda: answer.end is not None)
        assert len(answer.ids()) == 1
        assert answer.end is not None and answer.end.reason == STOP
        rig.cancel(answer)  # what the router does with the other part
        await rig.settle()
        rig.close()

    play(scene)


class DeadEnd:
    """A grammar, and its own constraint, that allows one token and then none."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.count = 0
        self.is_over = False

    def start(self, output: Sequence[int], stop_token_ids: frozenset[int]) -> Constraint:
        return self

    def num_valid(self, drafts: Sequence[int]) -> int:
        return len(drafts)

    def mask(self) -> Mask:
        if self.count:
            raise ConstraintFailed(self.reason)
        return np.full(VOCAB // 32, -1, dtype=np.int32)

    def advance(self, token_id: int) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("constraint_dead_end", Code.INVALID_ARGUMENT),
        ("constraint_too_complex", Code.INVALID_ARGUMENT),
        ("constraint_broken", Code.INTERNAL),
    ],
)
@pytest.mark.parametrize("part", [WHOLE, None])
def test_a_dead_end_fails_alone_and_says_why(reason: str, code: Code, part: int | None) -> None:
    model = load_model(PICO)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        mate = rig.ask(list(range(50)), 12)
        dead = rig.ask(list(range(90)), 50, part=part, grammar=lambda: DeadEnd(reason))
        await until(lambda: bool(dead.refusals and mate.end))
        assert len(mate.ids()) == 12
        [refused] = dead.refusals
        assert (refused.code, refused.reason, refused.is_retryable) == (code, reason, False)
        assert len(dead.tokens) == 1
        await rig.settle()
        rig.close()

    play(scene)
