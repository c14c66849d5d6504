"""What a body of /v1/chat/completions or /v1/completions asks for, ready to be run, whoever brought it. Event loop only."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from router.inference import Call, Inference, Write
from router.openai.answers import Answer, ChatAnswer, CompletionAnswer, UsageShown
from router.openai.requests import ChatBody, CompletionBody, read
from router.openai.tools import Plain, Reader
from router.prompts import generate_all
from splitfire.v1 import inference_pb2 as pb

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that was not streamed: its JSON, and what it took."""

    body: bytes
    usage: pb.Usage


@dataclass(frozen=True, slots=True)
class Asked:
    """`run` writes what is generated, `make` begins what it becomes: when the first of it is there."""

    run: Callable[[Call, Write], Awaitable[None]]
    make: Callable[[Call], Answer]
    is_stream: bool

    async def whole(self, call: Call) -> Whole:
        answer: Answer | None = None
        made: Whole | None = None

        async def take(response: pb.GenerateResponse) -> None:
            nonlocal answer, made
            if answer is None:
                answer = self.make(call)
            if response.HasField("summary"):
                made = Whole(answer.whole(response.summary), response.summary.usage)
            else:
                answer.take(response)

        await self.run(call, take)
        assert made is not None, "the summary is the last message"
        return made


class Completions:
    """`fingerprint`: of what the fleet serves now."""

    def __init__(self, inference: Inference, fingerprint: Callable[[], str]) -> None:
        self._inference = inference
        self._fingerprint = fingerprint

    def read(self, path: str, given: dict[str, Any]) -> Asked:
        """`path` is one of the two. SplitfireError names the parameter that is wrong."""
        return self._chat(given) if path == CHAT else self._complete(given)

    def _chat(self, given: dict[str, Any]) -> Asked:
        asked = read(ChatBody, given)
        make = partial(self._begin, ChatAnswer, "chatcmpl", asked.reader, asked.usage, _num_prompt, has_trace=asked.include_trace)
        return Asked(partial(self._inference.generate, asked.request()), make, bool(asked.stream))

    def _complete(self, given: dict[str, Any]) -> Asked:
        asked = read(CompletionBody, given)
        requests = asked.requests()
        if len(requests) == 1:
            make = partial(self._begin, CompletionAnswer, "cmpl", Plain, asked.usage, _num_prompt, has_trace=asked.include_trace)
            return Asked(partial(self._inference.generate, requests[0]), make, bool(asked.stream))

        def num_prompt(_call: Call) -> int:
            """Texts are ids by the time when the first answer begins."""
            return sum(len(request.prompt_token_ids) for request in requests)

        make = partial(self._begin, CompletionAnswer, "cmpl", Plain, asked.usage, num_prompt, has_trace=asked.include_trace)
        return Asked(partial(generate_all, self._inference, requests), make, bool(asked.stream))

    def _begin(
        self,
        kind: type[Answer],
        prefix: str,
        make_reader: Callable[[], Reader],
        usage: UsageShown,
        num_prompt: Callable[[Call], int],
        call: Call,
        *,
        has_trace: bool,
    ) -> Answer:
        name, piece = self._inference.model.limits().name, self._inference.detokenizer.piece
        answer_id, now = f"{prefix}-{call.request_id}", int(time.time())
        return kind(answer_id, name, now, self._fingerprint(), piece, make_reader, usage, num_prompt(call), has_trace=has_trace)


def _num_prompt(call: Call) -> int:
    """Its tokens, once it runs."""
    return len(call.choices[0].plan.prompt) if call.choices else 0
