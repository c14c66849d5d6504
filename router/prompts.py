"""A completion of several prompts: a request each, of one and the same client. Event loop only.

All of them are checked, and their texts tokenized, before any is run. Choices are numbered prompt by prompt: those of prompt 0 first.
What ends one ends all.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from router.inference import Call, Inference, Write
from router.openai.answers import joined
from splitfire.core import limits
from splitfire.core.errors import InvalidInput
from splitfire.core.validation import check_request, resolve_stopping
from splitfire.v1 import inference_pb2 as pb


async def generate_all(inference: Inference, requests: Sequence[pb.GenerateRequest], call: Call, write: Write) -> None:
    """As `Inference.generate`, for all of them: one summary at the end."""
    call.request_id = requests[0].request_id or secrets.token_hex(12)
    num_choices = [await _prepare(inference, request, call, index) for index, request in enumerate(requests)]
    summaries: list[pb.Summary] = [pb.Summary() for _ in requests]
    calls = [Call(call.tenant, call.traceparent, call.remaining_s) for _ in requests]
    at_once = asyncio.Semaphore(min(limits.MAX_PROMPTS_AT_ONCE, inference.max_running(call.tenant) or limits.MAX_PROMPTS_AT_ONCE))
    turn = asyncio.Lock()  # whoever reads gets one message after the other

    async def run(index: int) -> None:
        first_choice = sum(num_choices[:index])

        async def pass_on(response: pb.GenerateResponse) -> None:
            if response.HasField("summary"):
                summaries[index] = response.summary
                return
            response.choice += first_choice
            async with turn:
                await write(response)

        async with at_once:
            await inference.generate(requests[index], calls[index], pass_on)

    try:
        async with asyncio.TaskGroup() as group:
            for index in range(len(requests)):
                group.create_task(run(index), name=f"prompt-{call.request_id}-{index}")
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    finally:
        call.streams.extend(stream for one in calls for stream in one.streams)
    await write(pb.GenerateResponse(summary=joined(summaries, call.request_id)))


async def _prepare(inference: Inference, request: pb.GenerateRequest, call: Call, index: int) -> int:
    """Makes it one of ids, with an id of its own; how many choices it has. The error says which prompt it is about."""
    request.request_id = f"{call.request_id}-{index}"
    model = inference.model.limits()
    try:
        valid = check_request(request, model)
        ids = valid.token_ids
        if ids is None:
            ids = tuple(await inference.model.text.encode(valid.text or "", allow_special=call.tenant.allow_special))
            request.ClearField("text")
            request.prompt_token_ids.extend(ids)
        resolve_stopping(valid.stopping, len(ids), model)
    except InvalidInput as exc:
        if exc.field in ("prompt", "text", "prompt_token_ids"):
            raise type(exc)(f"prompt[{index}]", str(exc).removeprefix(f"{exc.field}: ")) from exc
        raise
    return valid.n
