"""Ids back to text: what is streamed is, all together, what the tokenizer says, whatever its kind and whatever the ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from router.detokenizer import BYTE_OF_LETTER, ByteText, Detokenizer, NeighbourText, TokenText
from tests.checkpoints import PICO, VOCAB

LETTER_OF_BYTE = {byte: chr(letter) for letter, byte in BYTE_OF_LETTER.items()}
KINDS = ("byte-level", "asks its neighbours", "odd tokens")


@lru_cache
def pico() -> Tokenizer:
    return Tokenizer.from_file(str(PICO / "tokenizer.json"))


@lru_cache
def odd() -> Tokenizer:
    """Byte-level, with tokens that no training makes: letters outside the alphabet, added ones special and not, no token for an id."""
    spellings = [*LETTER_OF_BYTE.values(), "Ġthe", "漢", " a", "Ġ漢", "ÃÂ", "é", "\x00", "🙂", "Ċ Ċ"]
    tokenizer = Tokenizer(BPE({spelling: i for i, spelling in enumerate(spellings)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("é漢"), AddedToken(" x ")])
    tokenizer.add_special_tokens([AddedToken("<end>"), AddedToken("Ġend")])
    return tokenizer


def begin(kind: str) -> tuple[Tokenizer, TokenText]:
    if kind == "asks its neighbours":
        return pico(), NeighbourText(pico())
    tokenizer = pico() if kind == "byte-level" else odd()
    return tokenizer, Detokenizer(tokenizer).begin()


def streamed(text: TokenText, ids: Sequence[int]) -> str:
    return "".join([*(text.push([i]) for i in ids), text.flush()])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_ids_stream_as_the_text_of_all_of_them(kind: str, data: st.DataObject) -> None:
    tokenizer, text = begin(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=40))
    assert streamed(text, ids) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(b"A\x80\xbf\xc3\xa9\xe6\xbc\xa2\xed\xa0\xf0\x9f\x99\x82\xf4\x90\xff"), max_size=30))
def test_bytes_that_are_no_text_become_what_the_library_makes_of_them(raw: list[int]) -> None:
    """Halves of characters, surrogates, what is beyond Unicode: as many U+FFFD, in the same places."""
    vocab = pico().get_vocab()
    ids = [vocab[LETTER_OF_BYTE[byte]] for byte in raw]
    assert streamed(Detokenizer(pico()).begin(), ids) == pico().decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_of_the_vocabulary_has_the_librarys_text(kind: str) -> None:
    tokenizer, _ = begin(kind)
    for token_id in range(tokenizer.get_vocab_size()):
        _, text = begin(kind)
        assert streamed(text, [token_id]) == tokenizer.decode([token_id], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS[:2])
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(1, 7))
def test_pieces_of_any_size_are_the_same_text(kind: str, text: str, size: int) -> None:
    tokenizer, stream = begin(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size)) + stream.flush() == text


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_character_is_sent_whole(kind: str) -> None:
    """B63."""
    tokenizer, text = begin(kind)
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    assert len(ids) > 1
    assert [text.push([i]) for i in ids] == [*[""] * (len(ids) - 1), "🙂"]
    assert text.flush() == ""
    _, cut = begin(kind)
    assert "".join(cut.push([i]) for i in ids[:-1]) == ""
    assert set(cut.flush()) == {"\ufffd"}


@pytest.mark.parametrize("tokens", ["any", "lone bytes", "specials", "one byte"])
def test_long_streams_cost_the_same_for_every_token(tokens: str) -> None:
    """Whatever a client forces with a logit bias: bytes that never become a character, tokens without text."""
    draw = random.Random(1)
    lone = [i for i in range(VOCAB) if "\ufffd" in pico().decode([i])]
    of_kind = {"any": range(10, VOCAB), "lone bytes": lone, "specials": range(4), "one byte": lone[:1]}[tokens]
    ids = [draw.choice(of_kind) for _ in range(2000)]
    text, sent = NeighbourText(pico()), ""
    for token_id in ids:
        sent += text.push([token_id])
        assert len(text._ids) < 64
    if tokens in ("lone bytes", "one byte"):
        assert sent, "what cannot become text is sent as U+FFFD, not held for ever"
    assert sent + text.flush() == pico().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("seed", range(10))
def test_characters_in_pieces_and_garbage_come_out_whole(kind: str, seed: int) -> None:
    draw = random.Random(seed)
    tokenizer, text = begin(kind)
    vocab = tokenizer.get_vocab()
    of_byte = [vocab[LETTER_OF_BYTE[byte]] for byte in range(256)]
    ids: list[int] = []
    for _ in range(60):
        if draw.random() < 0.6:
            ids += [of_byte[b] for b in draw.choice("é漢🙂🏴a\u0301").encode()]
        else:
            ids += draw.choices(of_byte, k=draw.randrange(1, 12))
    assert streamed(text, ids) == tokenizer.decode(ids)


def test_the_kind_is_chosen_by_the_tokenizers_own_decoder() -> None:
    assert isinstance(Detokenizer(pico()).begin(), ByteText)
    written = json.loads(pico().to_str())
    written["decoder"] = {"type": "Sequence", "decoders": [written["decoder"]]}
    assert isinstance(Detokenizer(Tokenizer.from_str(json.dumps(written))).begin(), NeighbourText)
