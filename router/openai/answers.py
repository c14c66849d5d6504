"""GenerateResponses as OpenAI's completions: chunks of a stream, or one object at the end. Pure.

Chunks are put together from pieces that stay the same and the text, because there is one for every token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from router.openai.tools import CallPart, Plain, Reader, Said
from router.timeline import LEG_NAMES
from splitfire.v1 import inference_pb2 as pb

FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
DONE = b"data: [DONE]\n\n"
Piece = Callable[[int], bytes]  # of a token id: its bytes


class UsageShown(Enum):
    """Where in a stream."""

    NEVER = auto()
    AT_END = auto()
    SO_FAR = auto()  # in every chunk


@dataclass(slots=True)
class ChoiceSoFar:
    """One answer, as far as it has come."""

    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    has_begun: bool = False
    num_chars: int = 0  # of text before what comes next
    reader: Reader = field(default_factory=Plain)
    calls: list[dict[str, Any]] = field(default_factory=list)
    has_calls: bool = False


class Answer:
    """One request's. `chunk` is called for every message of a stream but the summary; `whole` after the last of them."""

    kind = ""  # of the whole object
    chunk_kind = ""

    def __init__(
        self,
        request_id: str,
        model: str,
        created: int,
        fingerprint: str,
        piece: Piece,
        make_reader: Callable[[], Reader],
        usage: UsageShown,
        num_prompt: int,  # tokens
        *,
        has_trace: bool = False,
    ) -> None:
        self._request_id = request_id
        self._has_trace = has_trace
        self._piece = piece
        self._make_reader = make_reader
        self._choices: dict[int, ChoiceSoFar] = {}
        self._head = {"id": request_id, "created": created, "model": model, "system_fingerprint": fingerprint}
        self._usage = usage
        self._num_prompt, self._num_generated = num_prompt, 0
        opened = json.dumps({"object": self.chunk_kind, **self._head})[:-1]
        self._opened = f'data: {opened}, "choices": ['.encode()
        self._closed = b"]}\n\n" if usage is UsageShown.NEVER else b'], "usage": null}\n\n'

    def chunk(self, response: pb.GenerateResponse) -> bytes:
        """What a message adds, as events."""
        choice = self._choice(response.choice)
        logprobs = self._logprobs(choice, response)
        said, finish_reason = self._said(choice, response)
        choice.num_chars += len(response.text)
        if self._usage is UsageShown.SO_FAR:
            self._num_generated += len(response.token_ids)
            so_far = usage_of(pb.Usage(prompt_tokens=self._num_prompt, generated_tokens=self._num_generated))
            self._closed = f'], "usage": {json.dumps(so_far)}}}\n\n'.encode()
        events = self._events(choice, response.choice, said, logprobs, finish_reason)
        choice.has_begun = True
        if self._has_trace and response.token_ids:
            events.append(self._tokens_event(response))
        return b"".join(events)

    def last_chunk(self, summary: pb.Summary) -> bytes:
        """What ends a stream."""
        if self._usage is UsageShown.NEVER and not self._has_trace:
            return DONE
        last = {"object": self.chunk_kind, **self._head, "choices": [], **self._ending(summary)}
        return f"data: {json.dumps(last)}\n\n".encode() + DONE

    def take(self, response: pb.GenerateResponse) -> None:
        """Keeps a message for `whole`."""
        choice = self._choice(response.choice)
        choice.logprobs += self._logprobs(choice, response)
        said, choice.finish_reason = self._said(choice, response)
        choice.text.append(said.text)
        choice.num_chars += len(response.text)
        for part in said.calls:
            if part.name is not None:
                choice.calls.append(self._call(response.choice, part))
            else:
                choice.calls[-1]["function"]["arguments"] += part.arguments

    def whole(self, summary: pb.Summary) -> bytes:
        choices = [
            {"index": index, **self._body(choice), "finish_reason": choice.finish_reason}
            for index, choice in sorted(self._choices.items())
        ]
        ending = {"usage": usage_of(summary.usage), **self._ending(summary)}
        return json.dumps({"object": self.kind, **self._head, "choices": choices, **ending}).encode()

    def _ending(self, summary: pb.Summary) -> dict[str, Any]:
        """What is asked for beside the answer."""
        usage = {"usage": usage_of(summary.usage)} if self._usage is not UsageShown.NEVER else {}
        return usage | ({"splitfire": trace_of(summary)} if self._has_trace else {})

    def _tokens_event(self, response: pb.GenerateResponse) -> bytes:
        """The tokens of a message one by one, and which of them had been drafts."""
        pieces = [self._piece(token_id).decode(errors="replace") for token_id in response.token_ids]
        told = {"choice": response.choice, "pieces": pieces, "accepted_drafts": list(response.accepted_drafts)}
        event = {"object": self.chunk_kind, **self._head, "choices": [], "splitfire": told}
        return f"data: {json.dumps(event)}\n\n".encode()

    def _choice(self, index: int) -> ChoiceSoFar:
        if index not in self._choices:
            self._choices[index] = ChoiceSoFar(reader=self._make_reader())
        return self._choices[index]

    def _said(self, choice: ChoiceSoFar, response: pb.GenerateResponse) -> tuple[Said, str | None]:
        """What is text and what are calls; and how the choice ends, if it does."""
        said, reason = choice.reader.push(response.text), FINISH.get(response.finish_reason)
        if reason is not None:
            rest = choice.reader.end()
            said = Said(said.text + rest.text, said.calls + rest.calls)
        choice.has_calls |= bool(said.calls)
        return said, "tool_calls" if reason == "stop" and choice.has_calls else reason

    def _call(self, index: int, part: CallPart) -> dict[str, Any]:
        function = {"name": part.name, "arguments": part.arguments}
        return {"id": f"call-{self._request_id}-{index}-{part.index}", "type": "function", "function": function}

    def _events(
        self, choice: ChoiceSoFar, index: int, said: Said, logprobs: list[dict[str, Any]], finish_reason: str | None
    ) -> list[bytes]:
        raise NotImplementedError

    def _body(self, choice: ChoiceSoFar) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, choice: ChoiceSoFar, response: pb.GenerateResponse) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _event(self, index: int, parts: str, logprobs: object, finish_reason: str | None) -> bytes:
        """`parts`: the JSON of what is special, without braces."""
        said = "null" if logprobs is None else json.dumps(logprobs)
        end = f'"{finish_reason}"' if finish_reason else "null"
        return b"".join(
            (self._opened, f'{{"index": {index}, {parts}, "logprobs": {said}, "finish_reason": {end}}}'.encode(), self._closed)
        )


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def _events(
        self, choice: ChoiceSoFar, index: int, said: Said, logprobs: list[dict[str, Any]], finish_reason: str | None
    ) -> list[bytes]:
        shown = {"content": logprobs, "refusal": None} if logprobs else None
        events = []
        if not choice.has_begun:
            events.append(self._event(index, '"delta": {"role": "assistant", "content": ""}', None, None))
        if said.text or logprobs:
            events.append(self._event(index, f'"delta": {{"content": {json.dumps(said.text)}}}', shown, None))
        for part in said.calls:
            call: dict[str, Any] = {"function": {"arguments": part.arguments}} if part.name is None else self._call(index, part)
            events.append(
                self._event(index, f'"delta": {{"tool_calls": {json.dumps([{"index": part.index, **call}])}}}', None, None)
            )
        if finish_reason:
            events.append(self._event(index, '"delta": {}', None, finish_reason))
        return events

    def _body(self, choice: ChoiceSoFar) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        if choice.calls:
            message |= {"content": message["content"] or None, "tool_calls": choice.calls}
        return {"message": message, "logprobs": {"content": choice.logprobs, "refusal": None} if choice.logprobs else None}

    def _logprobs(self, choice: ChoiceSoFar, response: pb.GenerateResponse) -> list[dict[str, Any]]:
        return [{**self._one(each.chosen), "top_logprobs": [self._one(top) for top in each.top]} for each in response.logprobs]

    def _one(self, token: pb.TokenLogprob) -> dict[str, Any]:
        spelled = self._piece(token.token_id)
        return {"token": spelled.decode(errors="replace"), "logprob": token.logprob, "bytes": list(spelled)}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind, chunk_kind = "text_completion", "text_completion"

    def _events(
        self, choice: ChoiceSoFar, index: int, said: Said, logprobs: list[dict[str, Any]], finish_reason: str | None
    ) -> list[bytes]:
        shown = _columns(logprobs) if logprobs else None
        return [self._event(index, f'"text": {json.dumps(said.text)}', shown, finish_reason)]

    def _body(self, choice: ChoiceSoFar) -> dict[str, Any]:
        return {"text": "".join(choice.text), "logprobs": _columns(choice.logprobs) if choice.logprobs else None}

    def _logprobs(self, choice: ChoiceSoFar, response: pb.GenerateResponse) -> list[dict[str, Any]]:
        rows, offset = [], choice.num_chars
        for each in response.logprobs:
            token = self._piece(each.chosen.token_id).decode(errors="replace")
            top = {self._piece(one.token_id).decode(errors="replace"): one.logprob for one in each.top}
            rows.append({"tokens": token, "token_logprobs": each.chosen.logprob, "top_logprobs": top, "text_offset": offset})
            offset += len(token)
        return rows


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [row[name] for row in rows] for name in names}


def trace_of(summary: pb.Summary) -> dict[str, Any]:
    """Where the time went; docs/observability.md says what the phases are."""
    phases = [
        {
            "name": phase.name, "leg": LEG_NAMES[phase.leg], "start_s": phase.start_s, "duration_s": phase.duration_s,
            "count": phase.count or 1, "tokens": phase.tokens, "worker": phase.worker,
        }
        for phase in summary.phases
    ]  # fmt: skip
    told: dict[str, Any] = {
        "request_id": summary.request_id, "trace_id": summary.trace_id, "first_token_s": summary.first_token_s,
        "second_token_s": summary.second_token_s, "rest_s": summary.rest_s, "phases": phases,
        "drafts": {"proposed": summary.usage.draft_tokens, "accepted": summary.usage.accepted_draft_tokens},
    }  # fmt: skip
    if summary.HasField("kv_transfer"):
        moved = summary.kv_transfer
        told["kv_transfer"] = {
            "transport": moved.transport, "bytes": moved.bytes, "blocks": moved.blocks, "duration_s": moved.duration_s,
        }  # fmt: skip
    return told


def joined(summaries: Sequence[pb.Summary], request_id: str) -> pb.Summary:
    """Of a request that was run as several: the first one's, with what all of them used."""
    whole = pb.Summary()
    whole.CopyFrom(summaries[0])
    whole.request_id = request_id
    for summary in summaries[1:]:
        for part, count in summary.usage.ListFields():
            setattr(whole.usage, part.name, getattr(whole.usage, part.name) + count)
    return whole


def usage_of(usage: pb.Usage) -> dict[str, Any]:
    """Of drafts those count as predicted that were accepted or rejected, whatever proposed them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_draft_tokens,
            "rejected_prediction_tokens": max(0, usage.draft_tokens - usage.accepted_draft_tokens),
        },
    }
