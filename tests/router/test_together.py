"""Choices of one request: their first attempt is one, and whatever interrupts it, each goes on by itself."""

from __future__ import annotations

import asyncio

import pytest

from splitfire.core.errors import Code
from splitfire.v1 import fleet_pb2
from tests.router.fakes import FakeWorker
from tests.router.test_flow import LENGTH, STOP, Desk, dispatched, play, until


def cancels(worker: FakeWorker) -> list[fleet_pb2.Cancel]:
    return worker.frames("cancel")  # type: ignore[return-value]


def test_one_submit_for_all_and_each_gets_its_own_tokens() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask_together(3)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        [to_decode] = d.submits()
        for each in (submit, to_decode):
            assert (each.choice, list(each.more_choices)) == (0, [1, 2])
        assert submit.handoff.transfer_id == to_decode.handoff.transfer_id
        assert desk.admission.num_running == 3
        views = {v.is_prefill: v.num_running for v in desk.fleet.scan().workers}
        assert views == {True: 1, False: 3}
        for i in range(3):
            p.output(submit.attempt, 0, [10 + i], choice=i)
        p.finish(submit.attempt)
        for i in range(3):
            d.output(submit.attempt, 0, [10 + i, 20 + i, 30 + i], choice=i)
        for i in (2, 0, 1):
            d.finish(submit.attempt, LENGTH, choice=i)
        await asyncio.gather(*(a.task for a in asked))
        assert [a.choice.ids for a in asked] == [[10 + i, 20 + i, 30 + i] for i in range(3)]
        assert not p.taken()
        assert not d.taken(), "it knows that they have ended"
        desk.assert_nothing_left()

    play(scene())


def test_the_only_choice_of_a_request_is_as_ever() -> None:
    async def scene() -> None:
        desk = Desk()
        [asked] = desk.ask_together(1)
        _, submit = await dispatched(*desk.decodes)
        assert not submit.more_choices
        asked.task.cancel()
        await asyncio.gather(asked.task, return_exceptions=True)
        desk.assert_nothing_left()

    play(scene())


def test_a_choice_that_ends_with_its_first_token_is_cancelled_where_the_others_go_on() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask_together(2)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        d.taken()
        p.output(submit.attempt, 0, [10], choice=0)
        p.output(submit.attempt, 0, [11], choice=1)
        p.finish(submit.attempt, STOP, choice=1)
        await asked[1].task
        assert not p.taken(), "prefill said so itself"
        assert [(c.attempt, c.HasField("choice"), c.choice) for c in cancels(d)] == [(submit.attempt, True, 1)]
        d.refuse(submit.attempt, "bad_first_token", choice=1)  # it had not heard of that when the hand-off came
        p.finish(submit.attempt)
        d.output(submit.attempt, 0, [10, 20, 30])
        d.finish(submit.attempt, LENGTH)
        await asked[0].task
        assert [a.choice.ids for a in asked] == [[10, 20, 30], [11]]
        assert not any(a.choice.failed_at for a in asked)
        desk.assert_nothing_left()

    play(scene())


def test_a_stop_string_in_one_choice_leaves_the_others() -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask_together(2)
        [p], [d] = desk.prefills, desk.decodes
        _, submit = await dispatched(p)
        d.taken()
        p.finish(submit.attempt)
        for i in range(2):
            d.output(submit.attempt, 0, [10 + i, 20 + i], choice=i)
        asked[0].choice.stop()
        await asked[0].task
        assert [(c.attempt, c.choice) for c in cancels(d)] == [(submit.attempt, 0)]
        d.output(submit.attempt, 2, [30], choice=0)  # under way when it was cancelled
        d.output(submit.attempt, 2, [31], choice=1)
        d.finish(submit.attempt, LENGTH, choice=1)
        await asked[1].task
        assert [a.choice.ids for a in asked] == [[10, 20], [11, 21, 31]]
        desk.assert_nothing_left()

    play(scene())


def test_decode_death_after_the_fork_is_resumed_choice_by_choice() -> None:
    async def scene() -> None:
        desk = Desk(decodes=2)
        asked = desk.ask_together(3, max_tokens=4)
        [p] = desk.prefills
        d, submit = await dispatched(*desk.decodes)
        other = next(w for w in desk.decodes if w is not d)
        p.taken()
        p.finish(submit.attempt)
        for i in range(3):
            d.output(submit.attempt, 0, [10 + i, 20 + i][: 1 + i], choice=i)
        d.finish(submit.attempt, STOP, choice=1)
        d.die()
        again = []
        for _ in range(2):  # the prompt is to be computed again, one at a time
            _, each = await dispatched(other)
            again.append((each.choice, list(each.output_token_ids), list(each.more_choices)))
            tokens = [10 + each.choice, 20 + each.choice, 30 + each.choice, 40]
            known = len(each.output_token_ids)
            other.output(each.attempt, known, tokens[known:], choice=each.choice)
            other.finish(each.attempt, LENGTH, choice=each.choice)
        assert sorted(again) == [(0, [10], []), (2, [12, 22], [])]
        await asyncio.gather(*(a.task for a in asked))
        assert [a.choice.ids for a in asked] == [[10, 20, 30, 40], [11, 21], [12, 22, 32, 40]]
        desk.assert_nothing_left()

    play(scene())


def test_a_choice_that_fails_alone_is_tried_again_alone() -> None:
    async def scene() -> None:
        desk = Desk(decodes=2)
        asked = desk.ask_together(2)
        [p] = desk.prefills
        d, submit = await dispatched(*desk.decodes)
        other = next(w for w in desk.decodes if w is not d)
        p.taken()
        p.finish(submit.attempt)
        d.output(submit.attempt, 0, [10], choice=0)
        d.refuse(submit.attempt, "anything", choice=1)
        _, again = await dispatched(other)
        assert (again.choice, list(again.output_token_ids), list(again.more_choices)) == (1, [], [])
        assert not d.taken()
        other.output(again.attempt, 0, [11, 21, 31], choice=1)
        other.finish(again.attempt, LENGTH, choice=1)
        d.output(submit.attempt, 1, [20, 30], choice=0)
        d.finish(submit.attempt, LENGTH, choice=0)
        await asyncio.gather(*(a.task for a in asked))
        assert [a.choice.ids for a in asked] == [[10, 20, 30], [11, 21, 31]]
        desk.assert_nothing_left()

    play(scene())


def test_a_failed_hand_off_of_all_goes_to_another_decode_worker_at_once() -> None:
    async def scene() -> None:
        desk = Desk(decodes=2)
        asked = desk.ask_together(2)
        [p] = desk.prefills
        d, submit = await dispatched(*desk.decodes)
        other = next(w for w in desk.decodes if w is not d)
        p.taken()
        p.output(submit.attempt, 0, [10], choice=0)
        p.output(submit.attempt, 0, [11], choice=1)
        p.refuse(submit.attempt, "handoff_aborted", held=submit.handoff.transfer_id)
        _, again = await dispatched(other)
        assert (again.attempt, again.choice, list(again.more_choices)) == (submit.attempt, 0, [1])
        [redirect] = p.frames("redirect")
        assert redirect.handoff.transfer_id == again.handoff.transfer_id  # type: ignore[attr-defined]
        p.finish(submit.attempt)
        for i in range(2):
            other.output(submit.attempt, 0, [10 + i, 20 + i, 30 + i], choice=i)
            other.finish(submit.attempt, LENGTH, choice=i)
        await asyncio.gather(*(a.task for a in asked))
        desk.assert_nothing_left()

    play(scene())


def test_prefill_death_before_the_hand_off_is_invisible_to_all() -> None:
    async def scene() -> None:
        desk = Desk(prefills=2, split="never")
        asked = desk.ask_together(2)
        d, submit = await dispatched(*desk.decodes)
        assert submit.part == fleet_pb2.PART_WHOLE and list(submit.more_choices) == [1]
        d.refuse(submit.attempt, "draining")
        again: list[fleet_pb2.Submit] = []
        await until(lambda: again.extend(d.submits()) or len(again) == 2)  # type: ignore[func-returns-value]
        for each in again:
            d.output(each.attempt, 0, [1, 2, 3], choice=each.choice)
            d.finish(each.attempt, LENGTH, choice=each.choice)
        await asyncio.gather(*(a.task for a in asked))
        desk.assert_nothing_left()

    play(scene())


@pytest.mark.parametrize("choice", [5, 1])
def test_tokens_for_a_choice_that_was_not_asked_for_are_a_broken_protocol(choice: int) -> None:
    async def scene() -> None:
        desk = Desk()
        asked = desk.ask() if choice == 1 else desk.ask_together(2)[0]
        _, submit = await dispatched(*desk.decodes)
        [d] = desk.decodes
        d.output(submit.attempt, 0, [1], choice=choice)
        assert d.handle.strikes == 1
        asked.task.cancel()
        await asyncio.gather(asked.task, return_exceptions=True)

    play(scene())


@pytest.mark.parametrize("when", ["queued", "placed", "dispatched"])
def test_cancelling_one_or_all_leaves_nothing(when: str) -> None:
    async def scene(who: list[int]) -> None:
        desk = Desk()
        if when != "dispatched":
            desk.report_free(0)
        asked = desk.ask_together(3)
        [d] = desk.decodes
        if when == "dispatched":
            _, submit = await dispatched(d)
        else:
            await until(lambda: desk.admission.num_queued == 1)
        if when == "placed":
            desk.report_free(100)  # it has got its place; the choices have not had their turn yet
            assert desk.admission.num_running == 3
        for i in who:
            asked[i].task.cancel()
        await asyncio.gather(*(asked[i].task for i in who), return_exceptions=True)
        if len(who) < 3:
            desk.report_free(100)
            if when != "dispatched":
                _, submit = await dispatched(d)
                assert [submit.choice, *submit.more_choices] == [i for i in range(3) if i not in who]
            assert desk.admission.num_running == 3 - len(who)
            for i in set(range(3)) - set(who):
                d.output(submit.attempt, 0, [1, 2, 3], choice=i)
                d.finish(submit.attempt, LENGTH, choice=i)
            await asyncio.gather(*(a.task for i, a in enumerate(asked) if i not in who))
        await asyncio.sleep(0)
        desk.assert_nothing_left()

    for who in ([0], [1], [0, 2], [0, 1, 2]):
        play(scene(who))


def test_all_are_told_when_there_is_nobody() -> None:
    async def scene() -> None:
        desk = Desk(decodes=0)
        for asked in desk.ask_together(3):
            assert (await asked.refusal()).code is Code.UNAVAILABLE
        desk.assert_nothing_left()

    play(scene())


def test_a_group_waits_until_a_decode_worker_has_a_place_for_each() -> None:
    async def scene() -> None:
        desk = Desk()
        [d] = desk.decodes
        d.handle.hello.capacity.max_running = 4
        first = desk.ask_together(3)
        _, submit = await dispatched(d)
        second = desk.ask_together(2)
        await until(lambda: desk.admission.num_queued == 1)
        for i in range(2):
            d.output(submit.attempt, 0, [1, 2, 3], choice=i)
            d.finish(submit.attempt, LENGTH, choice=i)
        await until(lambda: desk.admission.num_queued == 0)
        wide = desk.ask_together(8)  # more than there are places: they take turns at the worker, when it is empty
        await until(lambda: desk.admission.num_queued == 1)
        for asked in (*first, *second):
            asked.task.cancel()
        await until(lambda: desk.admission.num_queued == 0)
        for asked in wide:
            asked.task.cancel()
        await asyncio.gather(*(a.task for a in (*first, *second, *wide)), return_exceptions=True)
        desk.assert_nothing_left()

    play(scene())
