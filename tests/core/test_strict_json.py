"""B47: what is no JSON, or more than any request needs, is told so in a moment."""

from __future__ import annotations

import time

import pytest

from splitfire.core.errors import InvalidInput
from splitfire.core.strict_json import MAX_DEPTH, parse_object


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"1", "must be a JSON object"),
        (b"\xff{}", "UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": [-Infinity]}', "Infinity"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' twice"),
        (b'{"a": ' + b"1" * 10**6 + b"}", "too long"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "deeper"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "deeper"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "deeper"),
    ],
)
def test_what_is_refused(body: bytes, word: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidInput, match="body: ") as caught:
        parse_object(body)
    assert word in str(caught.value)
    assert caught.value.reason == "invalid_json"
    assert len(str(caught.value)) < 200
    assert time.perf_counter() - began < 1.0


def test_what_is_accepted() -> None:
    assert parse_object(b'{"a": [1, 2.5e3, "\\u00e9", null, true]}') == {"a": [1, 2500.0, "é", None, True]}
    deep = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert "a" in parse_object(deep)
