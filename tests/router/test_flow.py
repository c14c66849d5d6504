"""Dispatch, order, recover: what clients see whatever workers do. Fake workers, the real flow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine

import pytest
from tokenizers import Tokenizer

from router.admission import AdmissionLimits
from router.choice import Choice, RequestPlan
from router.detokenizer import Detokenizer
from router.placement import Rules
from router.stream import ChoiceStream, summary_of
from router.text import TextStream
from router.views import Split
from splitfire.core import limits
from splitfire.core.errors import Code, DataLoss, SplitfireError
from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.lifecycle import Req
from splitfire.core.model_dir import ModelDir
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.v1 import fleet_pb2, inference_pb2
from tests.checkpoints import PICO
from tests.router.fakes import FakeWorker, fingerprint, make_inside

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
PROMPT = tuple(range(100, 170))


class Desk:
    """A flow over fake workers."""

    def __init__(self, prefills: int = 1, decodes: int = 1, split: Split = "auto") -> None:
        inside = make_inside(AdmissionLimits(10, 10, 10**6, 60.0, 60.0), Rules(split))
        self.fleet, self.admission, self.flow = inside.fleet, inside.admission, inside.flow
        self.prefills = [FakeWorker(self.fleet, "prefill", f"p{i}") for i in range(prefills)]
        self.decodes = [FakeWorker(self.fleet, "decode", f"d{i}") for i in range(decodes)]

    def ask(
        self,
        max_tokens: int = 5,
        timeout: float = 30.0,
        stop: frozenset[int] = frozenset(),
        logprobs: int | None = None,
        predicted: tuple[int, ...] = (),
        prompt: tuple[int, ...] = PROMPT,
    ) -> Asked:
        now = time.monotonic()
        sampling = SamplingParams(seed=3, logprobs=logprobs)
        plan = RequestPlan("r", prompt, sampling, StopParams(max_tokens, 0, stop), 2, "", "", now, now + timeout, predicted)
        choice = Choice(plan, 0, asyncio.Event())
        return Asked(choice, asyncio.create_task(self.flow.run(choice)))

    def ask_together(self, n: int, max_tokens: int = 3) -> list[Asked]:
        now = time.monotonic()
        plan = RequestPlan("r", PROMPT, SamplingParams(seed=3), StopParams(max_tokens), 2, "", "", now, now + 30.0)
        choices = [Choice(plan, index, asyncio.Event()) for index in range(n)]
        first = self.flow.first_attempt(choices)
        return [Asked(choice, asyncio.create_task(self.flow.run(choice, first))) for choice in choices]

    def report_free(self, free_blocks: int, prefill_tokens_per_s: float = 0.0) -> None:
        for worker in self.decodes:
            load = fleet_pb2.Load(total_blocks=100, free_blocks=free_blocks, prefill_tokens_per_s=prefill_tokens_per_s)
            self.fleet.on_report(fleet_pb2.ReportRequest(incarnation=worker.handle.incarnation, load=load))

    async def ask_and_place(self) -> Asked:
        """A request that has just got its place after waiting; the flow itself has not had its turn yet."""
        self.report_free(0)
        asked = self.ask(max_tokens=2)
        await until(lambda: self.admission.num_queued == 1)
        self.report_free(100)
        assert self.admission.num_running == 1
        return asked

    def assert_nothing_left(self) -> None:
        for worker in (*self.prefills, *self.decodes):
            assert not worker.handle.attempts
            assert not worker.handle.prompts
        assert self.admission.num_running == self.admission.num_queued == 0


class Asked:
    def __init__(self, choice: Choice, task: asyncio.Task[None]) -> None:
        self.choice = choice
        self.task = task

    async def refusal(self) -> SplitfireError:
        with pytest.raises(SplitfireError) as caught:
            await asyncio.wait_for(self.task, 5)
        return caught.value


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("condition never came true")


async def dispatched(*workers: FakeWorker) -> tuple[FakeWorker, fleet_pb2.Submit]:
    """The next submit any of them gets."""
    for _ in range(3000):
        for worker in workers:
            if (submit := worker.next_submit()) is not None:
                return worker, submit
        await asyncio.sleep(0.001)
    raise AssertionError("nothing was dispatched")


def play(scene: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 30))


def test_both_workers_get_the_same_request_at_once() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask()
        [p], [d] = desk.prefills, desk.decodes
        _, prefill = await dispatched(p)
        _, decode = await dispatched(d)
        assert (prefill.part, decode.part) == (fleet_pb2.PART_PREFILL, fleet_pb2.PART_DECODE)
        assert prefill.attempt == decode.attempt
        assert prefill.handoff.transfer_id == decode.handoff.transfer_id
        assert prefill.handoff.token == decode.handoff.token
        assert prefill.handoff.peer.worker_id == "d0"
        assert decode.handoff.peer.worker_id == "p0"
        assert tuple(prefill.prompt_token_ids) == PROMPT
        assert list(prefill.block_hashes) == list(hash_blocks(chain_root(b"", fingerprint().digest, ""), PROMPT, 32))
        p.output(prefill.attempt, 0, [7])
        p.finish(prefill.attempt)
        d.output(decode.attempt, 0, [7, 8, 9])  # the first token again
        d.output(decode.attempt, 3, [1, 2])
        d.finish(decode.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8, 9, 1, 2]
        assert asked.choice.finish_reason == LENGTH
        assert asked.choice.state is Req.DONE
        desk.assert_nothing_left()

    play(scene())


def test_predicted_output_goes_to_whoever_generates_wherever_the_request_goes_on() -> None:
    """Not to prefill, which drafts nothing; with every attempt anew."""

    async def scene() -> None:
        desk = Desk(prefills=1, decodes=2)
        asked = desk.ask(predicted=(5, 6, 7))
        _, prefill = await dispatched(*desk.prefills)
        d, decode = await dispatched(*desk.decodes)
        assert list(prefill.predicted_token_ids) == []
        assert list(decode.predicted_token_ids) == [5, 6, 7]
        d.output(decode.attempt, 0, [5, 6])
        d.die()
        other = next(w for w in desk.decodes if w is not d)
        _, again = await dispatched(other)
        assert (list(again.output_token_ids), list(again.predicted_token_ids)) == ([5, 6], [5, 6, 7])
        asked.task.cancel()
        await asyncio.gather(asked.task, return_exceptions=True)
        desk = Desk(prefills=0)
        asked = desk.ask(predicted=(5, 6, 7))
        _, whole = await dispatched(*desk.decodes)
        assert (whole.part, list(whole.predicted_token_ids)) == (fleet_pb2.PART_WHOLE, [5, 6, 7])
        asked.task.cancel()
        await asyncio.gather(asked.task, return_exceptions=True)

    play(scene())


def test_decode_may_be_heard_before_prefill() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask(max_tokens=2, logprobs=0)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        await until(lambda: d.handle.attempts)
        d.output(submit.attempt, 0, [7, 8], logprobs=2)
        p.output(submit.attempt, 0, [7], logprobs=1)
        d.finish(submit.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8]
        assert len(asked.choice.logprobs) == 2
        desk.assert_nothing_left()

    play(scene())


@pytest.mark.parametrize(
    ("offset", "ids"),
    [(3, [1]), (0, [8]), (1, [4096]), (1, [2**32 - 1]), (1, [1] * 50), (2**32 - 1, [1])],
    ids=["gap", "another token", "outside the vocabulary", "2^32-1", "more than asked for", "offset 2^32-1"],
)
def test_a_worker_that_breaks_the_protocol_loses_the_attempt(offset: int, ids: list[int]) -> None:
    """B60, B61: the client's stream goes on elsewhere."""

    async def scene() -> None:
        desk = Desk(prefills=0, decodes=1)
        asked = desk.ask()
        [d] = desk.decodes
        _, first = await dispatched(d)
        d.output(first.attempt, 0, [7])
        d.output(first.attempt, offset, ids)
        _, second = await dispatched(d)
        assert second.attempt != first.attempt
        assert list(second.output_token_ids) == [7]
        d.output(first.attempt, 1, [66])  # late: fenced
        d.output(second.attempt, 1, [8, 9, 10, 11])
        d.finish(second.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8, 9, 10, 11]
        assert d.handle.strikes == 1
        assert d.handle.view(time.monotonic()).is_suspect
        desk.assert_nothing_left()

    play(scene())


@pytest.mark.parametrize("streamed", [0, 1, 3])
def test_decode_death_is_resumed_elsewhere_with_the_tokens_streamed(streamed: int) -> None:
    """P9, F08: contiguous, nothing twice, the same seed."""

    async def scene() -> None:
        desk = Desk(prefills=1, decodes=2)
        asked = desk.ask()
        [p] = desk.prefills
        d, submit = await dispatched(*desk.decodes)
        if streamed:
            d.output(submit.attempt, 0, [7, 8, 9][:streamed])
        d.die()
        other = next(w for w in desk.decodes if w is not d)
        _, again = await dispatched(other)
        assert list(again.output_token_ids) == [7, 8, 9][:streamed]
        assert again.sampling.seed == submit.sampling.seed
        assert again.handoff.transfer_id != submit.handoff.transfer_id
        other.output(again.attempt, streamed, [7, 8, 9, 10, 11][streamed:])
        other.finish(again.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8, 9, 10, 11]
        assert any(f.reason for f in p.frames("cancel"))  # type: ignore[attr-defined]
        desk.assert_nothing_left()

    play(scene())


def test_drafts_are_counted_over_all_attempts_and_never_above_what_was_delivered() -> None:
    async def scene() -> None:
        desk = Desk(prefills=1, decodes=2)
        asked = desk.ask()
        d, submit = await dispatched(*desk.decodes)
        d.output(submit.attempt, 0, [7, 8, 9], drafted=4, accepted=1)
        d.die()
        other = next(w for w in desk.decodes if w is not d)
        _, again = await dispatched(other)
        other.output(again.attempt, 3, [10, 11], drafted=3, accepted=1)
        other.finish(again.attempt, LENGTH)
        await asked.task
        tokenizer = Tokenizer.from_file(str(ModelDir(PICO).tokenizer_path))
        stream = ChoiceStream(asked.choice, TextStream(Detokenizer(tokenizer), ()))
        stream.take()
        usage = summary_of([stream]).usage
        assert (usage.draft_tokens, usage.accepted_draft_tokens, usage.generated_tokens) == (7, 2, 5)
        asked.choice.accepted_offsets += range(5, 12)  # a stop string cut the answer in the middle of a frame
        assert summary_of([stream]).usage.accepted_draft_tokens == 5

    play(scene())


def test_prefill_death_before_the_kv_moved_is_invisible() -> None:
    """P8, F01-F03."""

    async def scene() -> None:
        desk = Desk(prefills=2, decodes=1)
        asked = desk.ask(max_tokens=2)
        p, lost = await dispatched(*desk.prefills)
        p.die()
        desk.decodes[0].refuse(lost.attempt)  # it hears of it too, and says that the KV will not come
        other = next(w for w in desk.prefills if w is not p)
        _, again = await dispatched(other)
        other.output(again.attempt, 0, [7])
        desk.decodes[0].output(again.attempt, 0, [7, 8])
        desk.decodes[0].finish(again.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8]
        desk.assert_nothing_left()

    play(scene())


def test_prefill_death_that_decode_does_not_mind_changes_nothing() -> None:
    """F05: the KV has moved, and prefill died before it could say so."""

    async def scene() -> None:
        desk = Desk(prefills=2)
        asked = desk.ask(max_tokens=2)
        p, submit = await dispatched(*desk.prefills)
        p.die()
        desk.decodes[0].output(submit.attempt, 0, [7, 8])
        desk.decodes[0].finish(submit.attempt, LENGTH)
        await asked.task
        assert not asked.choice.failed_at
        assert not any(w.submits() for w in desk.prefills)
        desk.assert_nothing_left()

    play(scene())


async def redirected(desk: Desk, p: FakeWorker, refuse: Callable[[FakeWorker, fleet_pb2.Submit], None]) -> fleet_pb2.Submit:
    """The first token has come, the hand-off fails; the submit that the other decode worker gets."""
    d, submit = await dispatched(*desk.decodes)
    p.output(submit.attempt, 0, [7])
    refuse(d, submit)
    other = next(w for w in desk.decodes if w is not d)
    _, again = await dispatched(other)
    return again


@pytest.mark.parametrize("how", ["decode dies", "decode has no room", "prefill says so"])
def test_a_failed_hand_off_goes_to_another_decode_worker_and_nothing_is_computed_again(how: str) -> None:
    """F06, F31."""

    async def scene() -> None:
        desk = Desk(decodes=2)
        asked = desk.ask(max_tokens=3, predicted=(8, 9))
        [p] = desk.prefills

        def refuse(d: FakeWorker, submit: fleet_pb2.Submit) -> None:
            if how == "decode dies":
                d.die()
            elif how == "decode has no room":
                d.refuse(submit.attempt, "handoff_no_room")
            else:
                p.refuse(submit.attempt, "handoff_aborted", held=submit.handoff.transfer_id)

        again = await redirected(desk, p, refuse)
        frames = p.taken()
        [submit] = [f.submit for f in frames if f.HasField("submit")]
        [redirect] = [f.redirect for f in frames if f.HasField("redirect")]
        assert redirect.attempt == again.attempt == submit.attempt
        assert redirect.handoff.transfer_id == again.handoff.transfer_id != submit.handoff.transfer_id
        assert redirect.handoff.token == again.handoff.token != submit.handoff.token
        assert list(again.output_token_ids) == [], "the first token is handed over, not given"
        assert list(again.predicted_token_ids) == [8, 9]
        p.refuse(submit.attempt, "handoff_aborted", held=submit.handoff.transfer_id)  # its word for the first, late
        p.finish(submit.attempt)
        other = next(w for w in desk.decodes if again.attempt in w.handle.attempts)
        other.output(again.attempt, 0, [7, 8, 9])
        other.finish(again.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8, 9]
        desk.assert_nothing_left()

    play(scene())


def test_without_another_decode_worker_a_held_prompt_is_let_go_and_submitted_again() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask(max_tokens=2)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        p.refuse(submit.attempt, "handoff_aborted", held=submit.handoff.transfer_id)
        await until(lambda: any(f.HasField("cancel") for f in p.taken()))
        _, again = await dispatched(d)
        await until(lambda: again.attempt in d.handle.attempts or d.handle.attempts)
        number = next(iter(d.handle.attempts))
        d.output(number, 0, [7, 8])
        d.finish(number, LENGTH)
        await asked.task
        desk.assert_nothing_left()

    play(scene())


def test_a_prompt_shipped_to_a_worker_that_died_is_not_waited_for_elsewhere() -> None:
    """Decode took it all and died; the router redirects before it hears that there is nothing left to redirect."""

    async def scene() -> None:
        desk = Desk(decodes=2)
        asked = desk.ask(max_tokens=2)
        [p] = desk.prefills
        d, submit = await dispatched(*desk.decodes)
        d.die()
        _, moved = await dispatched(*[w for w in desk.decodes if w is not d])
        finished = fleet_pb2.Finished(attempt=submit.attempt, transfer_id=submit.handoff.transfer_id)
        p.handle.attempts[submit.attempt].on_finished(p.handle.incarnation, finished)
        other, again = await dispatched(*[w for w in desk.decodes if w is not d])
        assert again.attempt != moved.attempt
        other.output(again.attempt, 0, [7, 8])
        other.finish(again.attempt, LENGTH)
        await asked.task
        desk.assert_nothing_left()

    play(scene())


def test_redirects_of_one_attempt_are_bounded() -> None:
    async def scene() -> None:
        desk = Desk(decodes=5)
        asked = desk.ask(max_tokens=2)
        numbers = []
        for _ in range(4):
            d, submit = await dispatched(*desk.decodes)
            numbers.append(submit.attempt)
            d.refuse(submit.attempt, "handoff_no_room")
        assert numbers == [numbers[0]] * 3 + [numbers[3]], "two redirects, then another attempt"
        asked.task.cancel()
        await asyncio.gather(asked.task, return_exceptions=True)
        desk.assert_nothing_left()

    play(scene())


def test_prefill_death_after_it_shipped_changes_nothing() -> None:
    """F05."""

    async def scene() -> None:
        desk = Desk()
        asked = desk.ask(max_tokens=2)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        p.output(submit.attempt, 0, [7])
        p.finish(submit.attempt)
        p.die()
        d.output(submit.attempt, 0, [7, 8])
        d.finish(submit.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8]

    play(scene())


@pytest.mark.parametrize("how", ["finishes", "dies", "refuses", "says nothing"])
def test_a_finished_answer_waits_a_moment_for_what_prefill_measured(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short answer overtakes prefill's frames: its tokens do not wait for them, its summary does."""
    monkeypatch.setattr(limits, "PREFILL_TIMES_WAIT_S", 0.05 if how == "says nothing" else 1000.0)

    async def scene() -> None:
        desk = Desk()
        asked = desk.ask(max_tokens=2)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        d.output(submit.attempt, 0, [7, 8])
        d.finish(submit.attempt, LENGTH)
        assert asked.choice.is_finished
        for _ in range(10):
            await asyncio.sleep(0)
        assert not asked.task.done()
        if how == "finishes":
            p.finish(submit.attempt, phases=[inference_pb2.Phase(name="pack", duration_s=1e-6, leg=inference_pb2.LEG_SECOND_TOKEN)])
        elif how == "dies":
            p.die()
        elif how == "refuses":
            p.refuse(submit.attempt, "handoff_aborted")
        await asyncio.wait_for(asked.task, 10)
        assert asked.choice.ids == [7, 8]
        asked.choice.timeline.sent(1, asked.choice.timeline.accepted_at + 1)
        asked.choice.timeline.sent(2, asked.choice.timeline.accepted_at + 2)
        assert ("pack" in {phase.name for phase in asked.choice.timeline.phases()}) == (how == "finishes")
        desk.assert_nothing_left()
        assert bool(p.frames("cancel")) == (how == "says nothing")

    play(scene())


def test_the_last_token_was_streamed_but_its_worker_died_before_saying_so() -> None:
    """F09: the answer is complete; nothing is computed past a stop token."""

    async def scene() -> None:
        for stop, reason in ((frozenset({9}), STOP), (frozenset(), LENGTH)):
            desk = Desk(prefills=0, decodes=2)
            asked = desk.ask(max_tokens=3, stop=stop)
            d, submit = await dispatched(*desk.decodes)
            d.output(submit.attempt, 0, [7, 8, 9])
            d.die()
            await asked.task
            assert asked.choice.ids == [7, 8, 9]
            assert asked.choice.finish_reason == reason
            desk.assert_nothing_left()

    play(scene())


def test_the_last_decode_worker_dying_says_what_is_missing() -> None:
    """F10."""

    async def scene() -> None:
        desk = Desk()
        asked = desk.ask()
        [d] = desk.decodes
        _, submit = await dispatched(d)
        d.output(submit.attempt, 0, [7])
        d.die()
        error = await asked.refusal()
        assert (error.code, error.reason, error.is_retryable) == (Code.UNAVAILABLE, "no_decode", True)
        assert asked.choice.state is Req.FAILED
        desk.assert_nothing_left()

    play(scene())


@pytest.mark.parametrize("who", ["prefill", "decode", "both"])
def test_a_worker_that_dies_between_placement_and_dispatch_leaves_no_orphan(who: str) -> None:
    async def scene() -> None:
        desk = Desk(prefills=2, decodes=2)
        asked = await desk.ask_and_place()
        [p] = [w for w in desk.prefills if w.handle.attempts]
        [d] = [w for w in desk.decodes if w.handle.attempts]
        survivors = [*desk.prefills, *desk.decodes]
        for worker, is_dead in ((p, who != "decode"), (d, who != "prefill")):
            if is_dead:
                worker.die()
                survivors.remove(worker)
        other_p, submit = await dispatched(*[w for w in survivors if w in desk.prefills])
        other_d = next(w for w in survivors if submit.attempt in w.handle.attempts and w in desk.decodes)
        assert submit.HasField("handoff")
        other_p.output(submit.attempt, 0, [7])
        other_d.output(submit.attempt, 0, [7, 8])
        other_d.finish(submit.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8]
        desk.assert_nothing_left()

    play(scene())


def test_all_workers_dying_between_placement_and_dispatch_is_an_honest_refusal() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = await desk.ask_and_place()
        for worker in (*desk.prefills, *desk.decodes):
            worker.die()
        error = await asked.refusal()
        assert (error.code, error.reason) == (Code.UNAVAILABLE, "no_decode")
        desk.assert_nothing_left()

    play(scene())


def test_the_next_attempt_goes_to_another_worker() -> None:
    """A worker that refuses fast is always the least loaded one."""

    async def scene() -> None:
        for _ in range(10):
            desk = Desk(prefills=0, decodes=2)
            asked = desk.ask(max_tokens=1)
            d, submit = await dispatched(*desk.decodes)
            d.refuse(submit.attempt)
            other, again = await dispatched(*desk.decodes)
            assert other is not d
            other.output(again.attempt, 0, [7])
            other.finish(again.attempt, LENGTH)
            await asked.task

    play(scene())


def test_a_hand_off_that_failed_is_tried_with_another_pair() -> None:
    async def scene() -> None:
        for _ in range(5):
            desk = Desk(prefills=2, decodes=2)
            asked = desk.ask()
            p, first = await dispatched(*desk.prefills)
            [d] = [w for w in desk.decodes if first.attempt in w.handle.attempts]
            p.refuse(first.attempt, "handoff_aborted")
            other_p, again = await dispatched(*desk.prefills)
            [other_d] = [w for w in desk.decodes if again.attempt in w.handle.attempts]
            assert other_p is not p
            assert other_d is not d
            asked.task.cancel()

    play(scene())


@pytest.mark.parametrize("when", ["while it waits", "while it is placed again"])
def test_a_stop_string_found_after_a_death_ends_the_answer(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client's text catches up after the worker died: there is nothing left to compute."""

    async def scene() -> None:
        desk = Desk(prefills=0, decodes=2)
        asked = desk.ask()
        d, submit = await dispatched(*desk.decodes)
        d.output(submit.attempt, 0, [7, 8])
        d.die()
        if when == "while it is placed again":
            await until(lambda: asked.choice.state in (Req.ADMITTED, Req.DISPATCHED))
        asked.choice.stop()
        await asked.task
        assert asked.choice.finish_reason == STOP
        assert asked.choice.state is Req.DONE
        desk.assert_nothing_left()

    play(scene())


def test_a_stop_string_found_while_the_answer_waits_for_a_place_ends_it() -> None:
    async def scene() -> None:
        desk = Desk(prefills=1, decodes=2)
        asked = desk.ask(max_tokens=9)
        d, submit = await dispatched(*desk.decodes)
        d.output(submit.attempt, 0, [7, 8])
        desk.report_free(0)
        d.die()
        await until(lambda: desk.admission.num_queued == 1)
        asked.choice.stop()
        await asked.task
        assert asked.choice.finish_reason == STOP
        assert asked.choice.state is Req.DONE
        desk.assert_nothing_left()

    play(scene())


def test_what_prefill_says_after_decode_has_begun_does_not_matter() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask(max_tokens=3)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        p.output(submit.attempt, 0, [7])
        d.output(submit.attempt, 0, [7, 8])
        p.refuse(submit.attempt, "handoff_aborted")
        d.output(submit.attempt, 2, [9])
        d.finish(submit.attempt, LENGTH)
        await asked.task
        assert asked.choice.ids == [7, 8, 9]
        desk.assert_nothing_left()

    play(scene())


@pytest.mark.parametrize(("code", "expected"), [(3, Code.INVALID_ARGUMENT), (9, Code.FAILED_PRECONDITION), (0, Code.INTERNAL)])
def test_a_workers_final_word_keeps_its_code(code: int, expected: Code) -> None:
    async def scene() -> None:
        desk = Desk(prefills=0, decodes=1)
        asked = desk.ask()
        d, submit = await dispatched(*desk.decodes)
        d.refuse(submit.attempt, "exceeds_context", retryable=False, code=code)
        assert (await asked.refusal()).code is expected
        desk.assert_nothing_left()

    play(scene())


def test_a_full_decode_pool_is_waited_for_at_the_router() -> None:
    async def scene() -> None:
        desk = Desk()
        [p] = desk.prefills
        desk.report_free(2)
        asked = desk.ask()
        await until(lambda: desk.admission.num_queued == 1)
        assert not p.submits()
        desk.report_free(3)
        await dispatched(p)
        asked.task.cancel()

    play(scene())


def test_attempts_are_bounded() -> None:
    async def scene() -> None:
        desk = Desk(prefills=0, decodes=1)
        asked = desk.ask()
        [d] = desk.decodes
        for _ in range(3):
            _, submit = await dispatched(d)
            d.refuse(submit.attempt)
        error = await asked.refusal()
        assert error.reason == "handoff_failed"
        desk.assert_nothing_left()

    play(scene())


def test_corrupt_kv_is_computed_again_once_and_then_reported() -> None:
    """F37, K4."""

    async def scene() -> None:
        desk = Desk()
        asked = desk.ask()
        [d] = desk.decodes
        for _ in range(2):
            _, submit = await dispatched(d)
            d.refuse(submit.attempt, "kv_digest_mismatch", code=15)
        error = await asked.refusal()
        assert isinstance(error, DataLoss)
        desk.assert_nothing_left()

    play(scene())


def test_what_cannot_work_anywhere_is_not_tried_again() -> None:
    async def scene() -> None:
        desk = Desk(prefills=0, decodes=2)
        asked = desk.ask()
        d, submit = await dispatched(*desk.decodes)
        d.refuse(submit.attempt, "nonfinite_logits", retryable=False, code=13)
        error = await asked.refusal()
        assert (error.code, error.reason) == (Code.INTERNAL, "nonfinite_logits")
        desk.assert_nothing_left()

    play(scene())


def test_a_first_token_that_ends_the_request_ends_it_at_both_workers() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask(stop=frozenset({7}))
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        p.output(submit.attempt, 0, [7])
        p.finish(submit.attempt, STOP)
        await asked.task
        assert [c.attempt for c in d.frames("cancel")] == [submit.attempt]  # type: ignore[attr-defined]
        desk.assert_nothing_left()

    play(scene())


@pytest.mark.parametrize("streamed", [0, 2])
def test_cancel_and_deadline_reach_both_workers(streamed: int) -> None:
    async def scene() -> None:
        for how in ("cancel", "deadline"):
            desk = Desk()
            asked = desk.ask(timeout=30.0 if how == "cancel" else 0.5)
            [p], [d] = desk.prefills, desk.decodes
            _, submit = await dispatched(p)
            if streamed:
                p.output(submit.attempt, 0, [7])
                d.output(submit.attempt, 0, [7, 8])
            if how == "cancel":
                asked.task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked.task
                assert asked.choice.state is Req.CANCELLED
            else:
                error = await asked.refusal()
                assert error.code is Code.DEADLINE_EXCEEDED
                assert error.reason == ("decode" if streamed else "prefill")
            for worker in (p, d):
                assert [c.attempt for c in worker.frames("cancel")] == [submit.attempt]  # type: ignore[attr-defined]
            desk.assert_nothing_left()

    play(scene())


def test_requests_wait_at_the_router_until_somebody_has_room() -> None:
    async def scene() -> None:
        desk = Desk(prefills=0, decodes=1)
        desk.report_free(100, prefill_tokens_per_s=280.0)
        # A quarter of a second each, of which no two have a block in common: the third would wait for more than a chunk.
        asked = [desk.ask(max_tokens=1, prompt=PROMPT[i:] + PROMPT[:i]) for i in range(6)]
        [d] = desk.decodes
        await until(lambda: desk.admission.num_running == 2 and desk.admission.num_queued == 4)
        done = 0
        while done < 6:
            for submit in d.submits():
                d.output(submit.attempt, 0, [1])
                d.finish(submit.attempt, LENGTH)
                done += 1
            await asyncio.sleep(0.001)
        for one_asked in asked:
            await one_asked.task
        desk.assert_nothing_left()

    play(scene())


def test_a_request_that_nobody_can_ever_take_is_refused_at_once() -> None:
    async def scene() -> None:
        for split, prefills, decodes, reason in (("auto", 1, 0, "no_decode"), ("always", 0, 1, "no_prefill")):
            desk = Desk(prefills, decodes, split)  # type: ignore[arg-type]
            error = await desk.ask().refusal()
            assert (error.code, error.reason) == (Code.UNAVAILABLE, reason)
            desk.assert_nothing_left()

    play(scene())


def test_a_queue_wait_past_the_deadline_says_queue() -> None:
    async def scene() -> None:
        desk = Desk(prefills=0, decodes=1)
        desk.report_free(100, prefill_tokens_per_s=280.0)
        for i in range(4):
            desk.ask(prompt=PROMPT[i:] + PROMPT[:i])
        late = desk.ask(timeout=0.05, prompt=PROMPT[5:] + PROMPT[:5])
        error = await late.refusal()
        assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, "queue")
        assert desk.admission.num_queued == 2

    play(scene())
