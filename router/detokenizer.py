"""Token ids to text, piece by piece: whole characters only, and in the end exactly what the tokenizer makes of all ids together.

Byte-level tokenizers spell a text's bytes, so each id has bytes of its own and a stream is a UTF-8 decoder. Others may look at
a token's neighbours; those are asked again for the last few ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes in UTF-8; a token has at least one
MAX_UNFINISHED = 8  # ids that may wait for the rest of a character


class TokenText(Protocol):
    """The text of one stream of ids."""

    def push(self, ids: Sequence[int]) -> str:
        """What is certain with these ids, and was not before."""

    def flush(self) -> str:
        """The end: an unfinished character comes out as U+FFFD."""


class Detokenizer:
    """One tokenizer's way back. Special tokens have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer) if isinstance(tokenizer.decoder, ByteLevel) else None

    def piece(self, token_id: int) -> bytes:
        """What one id stands for by itself, special tokens too; perhaps only a part of a character."""
        spelled = self._token_bytes[token_id] if self._token_bytes is not None else b""
        return spelled or self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def begin(self) -> TokenText:
        return ByteText(self._token_bytes) if self._token_bytes is not None else NeighbourText(self._tokenizer)


class TokenBytes(dict[int, bytes]):
    """The bytes of a byte-level tokenizer's ids, each looked up once; bounded by the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._specials = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # an id without a token has no text, and is not worth remembering
            return b""
        spelled = b"" if token in self._specials else _bytes_of(token)
        self[token_id] = spelled
        return spelled


class ByteText:
    """Of ids that are bytes. What waits is less than one character."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join([self._token_bytes[token_id] for token_id in ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class NeighbourText:
    """Of any ids: the last few are decoded again with each new one, which costs the same however long the text is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_settled = 0  # ids before these are decoded only as context
        self._settled = ""  # text of the context

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in ids])

    def flush(self) -> str:
        return self._settle(self._decode(self._ids), len(self._ids))

    def _push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text, end = self._decode(self._ids), len(self._ids)
        if text.endswith(REPLACEMENT):  # an unfinished character, or bytes that will never be one
            if end - self._num_settled <= MAX_UNFINISHED:
                return ""
            end -= LONGEST_CHARACTER - 1
            whole, text = text, self._decode(self._ids[:end])
            if not whole.startswith(text) and end - self._num_settled <= 2 * MAX_UNFINISHED:
                return ""
        return self._settle(text, end)

    def _settle(self, text: str, end: int) -> str:
        """What `text`, of the ids before `end`, adds; keeps the last ids, enough for tokenizers that look at their neighbour."""
        new = text[len(self._settled) :]
        if new or end - self._num_settled > MAX_UNFINISHED:  # special tokens have no text
            self._ids = self._ids[self._num_settled :]
            self._num_settled = end - self._num_settled
            self._settled = self._decode(self._ids[: self._num_settled])
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _alphabet() -> dict[int, int]:
    """Byte-level BPE's own letter for each byte (GPT-2's table), letter to byte."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte if byte in shown else next(others): byte for byte in range(0x100)}


BYTE_OF_LETTER = _alphabet()


def _bytes_of(token: str) -> bytes:
    """A token with any other letter stands for itself, as the tokenizers library has it."""
    letters = [BYTE_OF_LETTER.get(ord(letter)) for letter in token]
    spelled = [byte for byte in letters if byte is not None]
    return bytes(spelled) if len(spelled) == len(letters) else token.encode()
