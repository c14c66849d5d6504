"""Text at the router's edges: into token ids through a pool of killable processes, and back as the client reads.

Tokenizing and templates run elsewhere (text_worker.py) because a prompt can make them arbitrarily slow; decoding ids is
bounded work and happens here.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from router.processes import Answer, Busy, Died, ProcessPool
from splitfire.core import limits
from splitfire.core.errors import Exhausted, Internal, InvalidInput
from splitfire.core.model_dir import ModelDir
from splitfire.core.validation import ChatTurn

NUM_PROCESSES = 2
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes in UTF-8; a token has at least one
MAX_UNFINISHED = 8  # ids that may wait for the rest of a character


class TextPool:
    """Tokenizes with a time limit, in processes of its own."""

    def __init__(self, model: ModelDir) -> None:
        self._pool = ProcessPool("router.text_worker", model.path, "tokenizer.json or chat_template", NUM_PROCESSES)

    async def start(self) -> None:
        """ModelError when the tokenizer or the chat template cannot be used."""
        await self._pool.start()

    async def close(self) -> None:
        await self._pool.close()

    async def encode(self, text: str) -> list[int]:
        return await self._ask({"text": text}, "text")

    async def encode_continuation(self, text: str, field: str) -> list[int]:
        """Text that goes on where other text ends: no special tokens before it."""
        return await self._ask({"continuation": text}, field)

    async def encode_chat(self, messages: Sequence[ChatTurn]) -> list[int]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return await self._ask({"messages": turns}, "messages")

    async def _ask(self, question: Answer, field: str) -> list[int]:
        try:
            answer = await self._pool.ask(question, limits.TOKENIZE_TIMEOUT_S)
        except TimeoutError as exc:
            message = f"could not be tokenized within {limits.TOKENIZE_TIMEOUT_S:g} s; shorten it"
            raise InvalidInput(field, message, reason="tokenization_timeout") from exc
        except Died as exc:
            raise InvalidInput(
                field, "cannot be tokenized: its tokenizer process died; shorten it", reason="tokenization_failed"
            ) from exc
        except Busy as exc:
            raise Exhausted("all tokenizer processes are busy", reason="queue_full", retry_after_s=1.0) from exc
        if "bad" in answer:
            raise InvalidInput(field, str(answer["bad"]))
        if "failed" in answer:
            raise Internal(f"tokenizer failed: {answer['failed']}")
        return list(answer["ids"])


class TextStream:
    """Token ids of one choice to text, whole characters only, ending before the first stop string.

    `push` returns the text that is certain now; a tail that may be the beginning of a character or of a stop string
    waits. After a stop string matched, `is_stopped` and nothing more comes.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._num_settled = 0  # ids before these are decoded only as context
        self._settled = ""  # text of the context
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        text, end = self._decode(self._ids), len(self._ids)
        if text.endswith(REPLACEMENT):  # an unfinished character, or bytes that will never be one
            if end - self._num_settled <= MAX_UNFINISHED:
                return ""
            end -= LONGEST_CHARACTER - 1
            whole, text = text, self._decode(self._ids[:end])
            if not whole.startswith(text) and end - self._num_settled <= 2 * MAX_UNFINISHED:
                return ""
        return self._match(self._settle(text, end))

    def flush(self) -> str:
        """The end: what was held back comes out, an unfinished character as U+FFFD."""
        if self.is_stopped:
            return ""
        text = self._match(self._settle(self._decode(self._ids), len(self._ids)))
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _settle(self, text: str, end: int) -> str:
        """What `text`, of the ids before `end`, adds; keeps the last ids, enough for tokenizers that look at their neighbour."""
        new = text[len(self._settled) :]
        if new or end - self._num_settled > MAX_UNFINISHED:  # special tokens have no text
            self._ids = self._ids[self._num_settled :]
            self._num_settled = end - self._num_settled
            self._settled = self._decode(self._ids[: self._num_settled])
        return new

    def _match(self, text: str) -> str:
        if not self._stops:
            return text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.is_stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
