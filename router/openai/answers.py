"""GenerateResponses as OpenAI's completions: chunks of a stream, or one object at the end. Pure.

Chunks are put together from pieces that stay the same and the text, because there is one for every token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.openai.tools import CallPart, Plain, Reader, Said
from splitfire.v1 import inference_pb2 as pb

FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
DONE = b"data: [DONE]\n\n"
Piece = Callable[[int], bytes]  # of a token id: its bytes


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
        *,
        has_usage: bool,
    ) -> None:
        self._request_id = request_id
        self._piece = piece
        self._make_reader = make_reader
        self._choices: dict[int, ChoiceSoFar] = {}
        self._head = {"id": request_id, "created": created, "model": model, "system_fingerprint": fingerprint}
        self._has_usage = has_usage
        opened = json.dumps({"object": self.chunk_kind, **self._head})[:-1]
        self._opened = f'data: {opened}, "choices": ['.encode()
        self._closed = b'], "usage": null}\n\n' if has_usage else b"]}\n\n"

    def chunk(self, response: pb.GenerateResponse) -> bytes:
        """What a message adds, as events."""
        choice = self._choice(response.choice)
        logprobs = self._logprobs(choice, response)
        said, finish_reason = self._said(choice, response)
        choice.num_chars += len(response.text)
        events = self._events(choice, response.choice, said, logprobs, finish_reason)
        choice.has_begun = True
        return b"".join(events)

    def last_chunk(self, summary: pb.Summary) -> bytes:
        """What ends a stream."""
        if not self._has_usage:
            return DONE
        usage = {"object": self.chunk_kind, **self._head, "choices": [], "usage": usage_of(summary.usage)}
        return f"data: {json.dumps(usage)}\n\n".encode() + DONE

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
        return json.dumps({"object": self.kind, **self._head, "choices": choices, "usage": usage_of(summary.usage)}).encode()

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
