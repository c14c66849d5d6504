"""A completion of several prompts: all are checked before any runs, choices are numbered prompt by prompt, what ends one ends all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from router.inference import Call
from router.prompts import generate_all
from router.tenants import DEFAULT, Tenant
from splitfire.core import limits
from splitfire.core.errors import ExceedsContext, InvalidInput, SplitfireError, Unavailable
from splitfire.core.validation import ModelLimits
from splitfire.v1 import inference_pb2 as pb

MODEL = ModelLimits("m", 1000, 32)


class Fake:
    """Answers a prompt with its ids, choice by choice, a message each; `failing` prompts fail, after the others have begun."""

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.model = SimpleNamespace(limits=lambda: MODEL, text=self)
        self.failing = failing
        self.ran: list[pb.GenerateRequest] = []
        self.num_open = self.most_open = self.num_cancelled = 0

    async def encode(self, text: str, *, allow_special: bool) -> list[int]:
        return [ord(c) for c in text]

    def max_running(self, tenant: Tenant) -> int | None:
        return tenant.max_running

    async def generate(self, request: pb.GenerateRequest, call: Call, write: Any) -> None:
        self.ran.append(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(0)
            if request.prompt_token_ids[0] in self.failing:
                raise Unavailable("nobody is there", reason="no_decode")
            for index in reversed(range(request.n or 1)):
                await asyncio.sleep(0.2 if self.failing else 0)
                await write(pb.GenerateResponse(choice=index, text=str(list(request.prompt_token_ids))))
            usage = pb.Usage(prompt_tokens=len(request.prompt_token_ids), generated_tokens=7)
            await write(pb.GenerateResponse(summary=pb.Summary(request_id=request.request_id, usage=usage, model="m")))
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1


def requests(*prompts: str | list[int], **more: Any) -> list[pb.GenerateRequest]:
    return [
        pb.GenerateRequest(text=p, **more) if isinstance(p, str) else pb.GenerateRequest(prompt_token_ids=p, **more)
        for p in prompts
    ]


def run(fake: Fake, asked: list[pb.GenerateRequest], call: Call | None = None) -> tuple[dict[int, str], pb.Summary]:
    told: dict[int, str] = {}
    summaries: list[pb.Summary] = []
    is_writing = False

    async def write(response: pb.GenerateResponse) -> None:
        nonlocal is_writing
        assert not is_writing, "one message after the other"
        assert not summaries, "the summary is the last"
        is_writing = True
        await asyncio.sleep(0)
        is_writing = False
        if response.HasField("summary"):
            summaries.append(response.summary)
        else:
            told[response.choice] = told.get(response.choice, "") + response.text

    asyncio.run(generate_all(fake, asked, call or Call(DEFAULT), write))  # type: ignore[arg-type]
    return told, summaries[0]


def test_choices_are_numbered_prompt_by_prompt() -> None:
    call = Call(DEFAULT)
    fake = Fake()
    told, summary = run(fake, requests("a", [5, 6], "bc", n=2), call)
    assert told == {0: "[97]", 1: "[97]", 2: "[5, 6]", 3: "[5, 6]", 4: "[98, 99]", 5: "[98, 99]"}
    assert (summary.usage.prompt_tokens, summary.usage.generated_tokens) == (5, 21)
    assert summary.request_id == call.request_id and summary.model == "m"
    assert [request.request_id for request in fake.ran] == [f"{call.request_id}-{i}" for i in range(3)]


def test_an_id_of_the_clients_is_that_of_all() -> None:
    fake, call = Fake(), Call(DEFAULT)
    run(fake, requests("a", "b", request_id="mine"), call)
    assert call.request_id == "mine"
    assert {request.request_id for request in fake.ran} == {"mine-0", "mine-1"}


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        (requests("a", "b" * 40), ExceedsContext, r"prompt\[1\]: has 40 tokens"),
        (requests("a", "b", ""), InvalidInput, r"prompt\[2\]: must not be empty"),
        (requests([1], [1000]), InvalidInput, r"1000"),
        (requests([1], [1] * 32), ExceedsContext, r"prompt\[1\]: has 32 tokens"),
        (requests("a", "b", stopping=pb.StoppingParams(max_tokens=32)), ExceedsContext, "after a prompt of 1 tokens"),
        (requests("a", "b", n=99), InvalidInput, "n: is 99"),
        (requests("a", "b", request_id="x" * 128), InvalidInput, "request_id"),
    ],
)
def test_nothing_runs_when_one_is_wrong(asked: list[pb.GenerateRequest], kind: type[SplitfireError], says: str) -> None:
    fake = Fake()
    with pytest.raises(kind, match=says):
        run(fake, asked)
    assert not fake.ran


def test_what_ends_one_ends_all() -> None:
    fake = Fake(failing=[98])
    with pytest.raises(Unavailable):
        run(fake, requests("a", "b", "c"))
    assert (fake.num_open, fake.num_cancelled) == (0, 2)


@pytest.mark.parametrize(("max_running", "most"), [(None, limits.MAX_PROMPTS_AT_ONCE), (2, 2)])
def test_there_is_a_bound_to_what_runs_at_once(max_running: int | None, most: int) -> None:
    fake = Fake()
    told, _ = run(fake, requests(*["a"] * limits.MAX_PROMPTS), Call(replace(DEFAULT, max_running=max_running)))
    assert len(told) == limits.MAX_PROMPTS
    assert fake.most_open == most
