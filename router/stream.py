"""What a client is sent: the new tokens of a choice as one message, and the summary that ends the stream. Event loop only.

Messages are written one at a time; what comes while the client's stream is busy becomes one message. A client that takes
none for SLOW_CLIENT_S is given up.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from router.choice import Choice
from router.text import TextStream
from splitfire.core import limits
from splitfire.core.errors import Exhausted
from splitfire.v1 import inference_pb2 as pb


class ChoiceStream:
    """What of one choice has been sent. Ids become text here, when the client's turn comes."""

    def __init__(self, choice: Choice, text: TextStream) -> None:
        self.choice = choice
        self.num_sent = 0
        self.is_finished = False
        self._text = text

    def take(self) -> pb.GenerateResponse | None:
        """Everything new as one message; None when there is nothing."""
        choice = self.choice
        if self.is_finished:
            return None
        offset = self.num_sent
        text, count = self._text.take(choice.ids[offset:])
        if self._text.is_stopped:
            choice.stop()
        self.num_sent = end = offset + count
        response = pb.GenerateResponse(
            choice=choice.index, offset=offset, token_ids=choice.ids[offset:end], text=text, logprobs=choice.logprobs[offset:end]
        )
        if choice.accepted_offsets:
            begin, stop = (bisect_left(choice.accepted_offsets, at) for at in (offset, end))
            response.accepted_drafts.extend(at - offset for at in choice.accepted_offsets[begin:stop])
        if choice.is_finished and (self._text.is_stopped or end == len(choice.ids)):
            response.text += self._text.flush()
            response.finish_reason = choice.finish_reason
            self.is_finished = True
        return response if count or self.is_finished else None


class ClientWriter:
    """One client's stream, as long as it is in use as a context. There is one timer for all its messages, not one for each: it looks
    whether the message under way has waited too long."""

    def __init__(self, write: Callable[[pb.GenerateResponse], Awaitable[None]], most_s: float = limits.SLOW_CLIENT_S) -> None:
        self._write = write
        self._most_s = most_s
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # the message under way waits
        self._limit = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> ClientWriter:
        await self._limit.__aenter__()
        self._look()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Exhausted, where the client was too slow."""
        assert self._timer is not None
        self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as exc:
            raise Exhausted(f"the client read nothing for {self._most_s:g} s", reason="slow_consumer") from exc

    async def write(self, response: pb.GenerateResponse) -> None:
        self._since = self._loop.time()
        await self._write(response)
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        left_s = self._most_s - (now - self._since if self._since is not None else 0.0)
        if left_s <= 0:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_later(left_s, self._look)


def summary_of(streams: Sequence[ChoiceStream]) -> pb.Summary:
    """The last message of a stream, or what it came to before it broke off; phases, cache and transfer are those of choice 0."""
    choices, num_sent = [stream.choice for stream in streams], sum(stream.num_sent for stream in streams)
    plan, timeline = choices[0].plan, choices[0].timeline
    num_gaps = streams[0].num_sent - 1
    return pb.Summary(
        request_id=plan.request_id,
        seed=plan.sampling.seed,
        usage=pb.Usage(
            prompt_tokens=len(plan.prompt),
            cached_prompt_tokens=min(timeline.cached_tokens, len(plan.prompt)),
            generated_tokens=num_sent,
            draft_tokens=sum(c.draft_tokens for c in choices),
            accepted_draft_tokens=min(num_sent, sum(len(c.accepted_offsets) for c in choices)),  # some came after a stop string
        ),
        phases=timeline.phases(),
        kv_transfer=timeline.kv_transfer,
        first_token_s=timeline.first_token_s,
        second_token_s=timeline.second_token_s,
        rest_s=timeline.rest_s,
        each_token_s=(timeline.second_token_s + timeline.rest_s) / num_gaps if num_gaps > 0 else 0.0,
    )
