"""Text at the router's edges: into token ids, and back as the client reads (detokenizer.py).

Templates and long texts run elsewhere (text_worker.py), in processes that may be killed, because a prompt can make them
arbitrarily slow. What is short is tokenized here, on the event loop, as long as this tokenizer is seen to be quick about it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog
from tokenizers import Tokenizer

from router.detokenizer import Detokenizer
from router.processes import Answer, Busy, Died, ProcessPool
from splitfire.core import limits
from splitfire.core.chat import Conversation
from splitfire.core.errors import Exhausted, Internal, InvalidInput
from splitfire.core.model_dir import ModelDir

log = structlog.get_logger("router")
NUM_PROCESSES = 2
SHORT_BYTES = 8192
SHORT_MOST_S = 0.05  # of processor time; byte-level BPE takes 4 ms for the worst 8 KB known, 0.05 for 300 bytes of prose
# What makes tokenizers slow (B07): one word without end, marks, emoji that join, runs that a pattern may match in many ways.
SLOW_TEXTS = ("a", "a ", "ab", " ", "\n", "1", "(", "'", "_", "\u0301", "漢", "👩\u200d👩\u200d👧", "<|endoftext|>", "a.")


class ShortTexts:
    """Tokenizes texts of at most SHORT_BYTES at once. A tokenizer that once takes longer than SHORT_MOST_S for one of them does no
    more here: which texts are slow is its pattern's business, and nobody can stop it half way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that looks like a special token is plain text (B09)
        self.is_quick = True
        for slow in SLOW_TEXTS:
            self.encode(slow * (SHORT_BYTES // len(slow.encode())), add_special_tokens=False)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int] | None:
        """None: ask the pool."""
        is_short = len(text) <= SHORT_BYTES and len(text.encode()) <= SHORT_BYTES
        if not is_short or not self.is_quick:
            return None
        began = time.thread_time()
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as exc:  # the library panics with a BaseException of its own; the pool says what is wrong
            if isinstance(exc, KeyboardInterrupt | SystemExit):
                raise
            return None
        if (took_s := time.thread_time() - began) > SHORT_MOST_S:
            self.is_quick = False
            log.warning(
                "the tokenizer is slow: short texts go to its processes too", seconds=round(took_s, 3), limit_s=SHORT_MOST_S
            )
        return list(ids)


class TextPool:
    """Tokenizes with a time limit: what is short here, everything else in processes of its own."""

    def __init__(self, model: ModelDir) -> None:
        self._model = model
        self._pool = ProcessPool("router.text_worker", model.path, "tokenizer.json or chat_template", NUM_PROCESSES)
        self._short: ShortTexts | None = None

    async def start(self) -> None:
        """ModelError when the tokenizer or the chat template cannot be used."""
        await self._pool.start()  # first: where loading it cannot hurt
        self._short = ShortTexts(Tokenizer.from_file(str(self._model.tokenizer_path)))

    async def close(self) -> None:
        await self._pool.close()

    async def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """`allow_special`: special tokens that are written out in it count as such (B09)."""
        if allow_special:
            return await self._ask({"text": text, "allow_special": True}, "text")
        ids = self._short.encode(text, add_special_tokens=True) if self._short is not None else None
        return ids if ids is not None else await self._ask({"text": text}, "text")

    async def encode_continuation(self, text: str, field: str) -> list[int]:
        """Text that goes on where other text ends: no special tokens before it."""
        ids = self._short.encode(text, add_special_tokens=False) if self._short is not None else None
        return ids if ids is not None else await self._ask({"continuation": text}, field)

    async def encode_chat(self, chat: Conversation) -> list[int]:
        question: Answer = {"messages": [turn.shown() for turn in chat.turns], "tools": [tool.shown() for tool in chat.tools]}
        return await self._ask(question, "messages")

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

    `take` returns the text that is certain now; a tail that may be the beginning of a character or of a stop string
    waits. After a stop string matched, `is_stopped` and nothing more comes.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._text = detokenizer.begin()
        self._stops = tuple(stops)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.is_stopped = False

    def take(self, ids: Sequence[int]) -> tuple[str, int]:
        """Text, and how many of `ids` it took: fewer when a stop string matched."""
        if not self._stops:
            return self._text.push(ids), len(ids)
        text = ""
        for count, token_id in enumerate(ids):
            if self.is_stopped:
                return text, count
            text += self._match(self._text.push((token_id,)))
        return text, len(ids)

    def flush(self) -> str:
        """The end: what was held back comes out, an unfinished character as U+FFFD."""
        if self.is_stopped:
            return ""
        text = self._match(self._text.flush())
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
