"""What a stream says of its usage: nothing, at its end, or all along."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.openai.answers import ChatAnswer, CompletionAnswer, UsageShown, joined
from router.openai.requests import CompletionBody, read
from router.openai.tools import Plain
from splitfire.core.errors import InvalidInput
from splitfire.v1 import inference_pb2 as pb


def stream(kind: Any, usage: UsageShown) -> list[dict[str, Any]]:
    answer = kind("x", "m", 0, "f", lambda _: b"", Plain, usage, 5)
    events = b"".join(answer.chunk(pb.GenerateResponse(text="a", token_ids=[1] * count)) for count in (1, 2))
    events += answer.last_chunk(pb.Summary(usage=pb.Usage(prompt_tokens=5, generated_tokens=3)))
    told = [event.removeprefix("data: ") for event in events.decode().split("\n\n") if event]
    assert told.pop() == "[DONE]"
    return [json.loads(event) for event in told]


@pytest.mark.parametrize("kind", [ChatAnswer, CompletionAnswer])
def test_usage_is_where_it_was_asked_for(kind: Any) -> None:
    assert all("usage" not in chunk for chunk in stream(kind, UsageShown.NEVER))
    *chunks, last = stream(kind, UsageShown.AT_END)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["total_tokens"] == 8 and not last["choices"]
    *chunks, last = stream(kind, UsageShown.SO_FAR)
    so_far = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in chunks]
    assert so_far[0] == (5, 1) and so_far[-1] == (5, 3) and so_far == sorted(so_far)
    assert last["usage"]["completion_tokens"] == 3


def test_usage_so_far_needs_usage() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert read(CompletionBody, {"prompt": "a", "stream_options": options}).usage is UsageShown.SO_FAR
    assert read(CompletionBody, {"prompt": "a"}).usage is UsageShown.NEVER
    with pytest.raises(InvalidInput, match="needs include_usage"):
        _ = read(CompletionBody, {"prompt": "a", "stream_options": {"continuous_usage_stats": True}}).usage


def test_the_usage_of_several_is_their_sum() -> None:
    first = pb.Summary(request_id="r-0", seed=3, model="m", usage=pb.Usage(prompt_tokens=1, generated_tokens=2))
    second = pb.Summary(request_id="r-1", usage=pb.Usage(prompt_tokens=4, cached_prompt_tokens=3, draft_tokens=9))
    whole = joined([first, second], "r")
    expected = pb.Usage(prompt_tokens=5, cached_prompt_tokens=3, generated_tokens=2, draft_tokens=9)
    assert whole == pb.Summary(request_id="r", seed=3, model="m", usage=expected)
    assert first.usage.prompt_tokens == 1
