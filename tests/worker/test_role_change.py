"""A worker that takes on the other role gives back what waits, then what is left; nothing is held, and what was given back goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitfire.core import limits
from splitfire.core.errors import SplitfireError, Unavailable
from splitfire.engine.engine import Engine
from splitfire.engine.updates import StepResult
from splitfire.v1 import fleet_pb2, inference_pb2
from splitfire.worker import role_change
from splitfire.worker.role_change import RoleChanger
from tests.checkpoints import family_configs, save_checkpoint
from tests.engines import load_model, make_engine
from tests.rig import Answer, Node, Rig, play, until

WHOLE = fleet_pb2.PART_WHOLE
PREFILL, DECODE = inference_pb2.ROLE_PREFILL, inference_pb2.ROLE_DECODE
ELSEWHERE = Unavailable("the worker takes on another role", reason="role_change")
LONG = [(3 * i) % 200 for i in range(400)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return path


def rig_of(path: Path, **decode: Any) -> Rig:
    model = load_model(path)
    return Rig(slow(make_engine(model, chunk_tokens=16, max_running=2)), slow(make_engine(model, **{"num_blocks": 256, **decode})))


def slow(engine: Engine) -> Engine:
    """So that what is under way still is when a test that was kept waiting looks again: its thread goes on meanwhile."""
    step = engine.step

    def slowly() -> StepResult:
        time.sleep(0.01)
        return step()

    engine.step = slowly  # type: ignore[method-assign]
    return engine


def give_back(rig: Rig, node: Node, *, only_waiting: bool) -> None:
    for service in node.services:
        for replies in rig.replies.values():
            service.give_back(replies, ELSEWHERE, only_waiting=only_waiting)


def reasons(answers: list[Answer]) -> list[list[str]]:
    return [[refused.reason for refused in answer.refusals if refused.is_retryable] for answer in answers]


def test_prompts_that_have_not_begun_are_given_back_and_the_others_finish(llama: Path) -> None:
    async def scene() -> None:
        rig = rig_of(llama)
        answers = [rig.ask([i, *LONG], 3) for i in range(6)]
        await until(lambda: rig.prefill.agent.num_sending > 0)
        give_back(rig, rig.prefill, only_waiting=True)
        gone = [answer for answer in answers if answer.refusals]
        assert 0 < len(gone) < 6
        assert reasons(gone) == [["role_change"]] * len(gone)
        await until(lambda: all(answer.end for answer in answers if answer not in gone))
        for answer in gone:  # the router withdraws the other half
            rig.cancel(answer)
        await rig.settle()
        rig.close()

    play(scene())


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_prompt_is_given_back_between_two_chunks(llama: Path, num_choices: int) -> None:
    async def scene() -> None:
        rig = rig_of(llama)
        answers = rig.ask_together(num_choices, LONG, 3)
        await until(lambda: rig.decode.agent.num_receiving > 0)
        give_back(rig, rig.prefill, only_waiting=False)
        assert reasons(answers) == [["role_change"]] * num_choices
        rig.cancel(answers[0])
        await rig.settle()
        rig.close()

    play(scene())


def test_hand_offs_without_room_are_given_back_as_one_and_sequences_that_run_stay(llama: Path) -> None:
    async def scene() -> None:
        rig = rig_of(llama, num_blocks=24)
        running = rig.ask(LONG, 100)
        await until(lambda: len(running.tokens) > 3)
        waiting = rig.ask_together(2, [9, *LONG], 3)
        await until(lambda: rig.decode.agent.num_receiving > 0)
        give_back(rig, rig.decode, only_waiting=True)
        assert reasons(waiting) == [["role_change"]] * 2
        assert not any(refused.HasField("choice") for answer in waiting for refused in answer.refusals), "one word for both"
        assert not running.refusals
        await until(lambda: running.end is not None)
        rig.cancel(waiting[0])
        await rig.settle()
        rig.close()

    play(scene())


@pytest.mark.parametrize("part", [WHOLE, None])
def test_sequences_that_are_given_back_go_on_elsewhere_with_the_same_tokens(llama: Path, part: int | None) -> None:
    async def scene() -> None:
        rig = rig_of(llama)
        expected = rig.ask(LONG, 60)
        await until(lambda: expected.end is not None)
        moved = rig.ask(LONG, 60, part=part)
        await until(lambda: len(moved.tokens) > 5)
        give_back(rig, rig.decode, only_waiting=True)
        assert not moved.refusals, "it runs"
        give_back(rig, rig.decode, only_waiting=False)
        assert reasons([moved]) == [["role_change"]]
        streamed = moved.ids()
        resumed = rig.ask(LONG, 60, output=streamed)
        await until(lambda: resumed.end is not None)
        assert streamed + resumed.ids() == expected.ids()
        await rig.settle()
        rig.close()

    play(scene())


# -- the order of things


class Inside:
    """A worker, its links and its services in one: notes what it is told, and is busy for as long as a test wants."""

    def __init__(self) -> None:
        self.num_busy = 1
        self.said: list[str] = []
        self.changer = RoleChanger("decode", self, self, [self])  # type: ignore[arg-type, list-item]

    def __iter__(self) -> Iterator[str]:
        return iter(["link"])

    def report_now(self) -> None:
        self.said.append("drains" if self.changer.is_changing else "ready")

    def give_back(self, _link: object, error: SplitfireError, *, only_waiting: bool) -> None:
        assert error.reason == "role_change"
        assert error.is_retryable
        self.said.append("gives back what waits" if only_waiting else "gives back all")

    async def flush(self) -> None:
        self.said.append("is heard")

    def attach_again(self) -> None:
        self.said.append(f"attaches as {self.changer.role}")


def test_it_is_changed_when_nothing_of_the_old_role_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_change, "TOLD_S", 0.0)

    async def scene() -> None:
        inside = Inside()
        inside.changer.refuse()
        assert inside.changer.begin(PREFILL, 30.0)
        with pytest.raises(Unavailable, match="another role"):
            inside.changer.refuse()
        changing = asyncio.create_task(inside.changer.run(30.0))
        await until(lambda: len(inside.said) == 2)
        assert not inside.changer.begin(PREFILL, 30.0), "once is enough"
        assert inside.changer.wire_role == DECODE
        inside.num_busy = 0
        await changing
        assert inside.said == ["drains", "gives back what waits", "gives back all", "is heard", "attaches as prefill"]
        assert inside.changer.wire_role == PREFILL
        inside.changer.refuse()
        assert not inside.changer.begin(PREFILL, 30.0), "it has that role"
        assert not inside.changer.begin(9, 30.0)

    play(scene())


@pytest.mark.parametrize("grace_s", [0.1, -1.0, float("nan")])
def test_what_never_ends_does_not_keep_a_worker_from_changing(grace_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_change, "TOLD_S", 0.0)
    monkeypatch.setattr(limits, "PROGRESS_S", 0.1)

    async def scene() -> None:
        inside = Inside()
        assert inside.changer.begin(PREFILL, grace_s)
        await inside.changer.run(grace_s)
        assert inside.said[-1] == "attaches as prefill"

    play(scene(), 10.0)
