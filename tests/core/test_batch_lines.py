"""Lines of batch files: what is none is named, by line and field, and a file cannot make anybody hold more than a line of it."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from splitfire.core import limits
from splitfire.core.batch_lines import CustomIds, answer_row, custom_id_of, error_row, parse_line, read_lines
from splitfire.core.errors import InvalidInput


def line(**changes: Any) -> bytes:
    whole = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}, **changes}
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def test_a_line_is_a_request() -> None:
    request = parse_line(line())
    assert (request.custom_id, request.url, request.body) == ("a", "/v1/completions", {"prompt": "x"})


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"{", "line"),
        (b"[]", "line"),
        (b'{"custom_id": "a", "custom_id": "b"}', "line"),
        (b"\xff{}", "line"),
        (line(custom_id=...), "custom_id"),
        (line(custom_id=""), "custom_id"),
        (line(custom_id=7), "custom_id"),
        (line(custom_id="x" * (limits.MAX_CUSTOM_ID_CHARS + 1)), "custom_id"),
        (line(method="GET"), "method"),
        (line(method=...), "method"),
        (line(url="/v1/embeddings"), "url"),
        (line(url=["/v1/completions"]), "url"),
        (line(body="x"), "body"),
        (line(body=...), "body"),
        (line(body={"prompt": "x", "stream": True}), "body.stream"),
        (line(priority=1), "priority"),
        (b'{"custom_id": "\\ud800"}', "line"),
    ],
)
def test_what_is_no_request_is_named(content: bytes, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_line(content)
    assert caught.value.field == field


def test_lines_end_as_people_end_them() -> None:
    content = b"\xef\xbb\xbf" + line(custom_id="a") + b"\r\n\n  \n" + line(custom_id="b") + b"\n" + line(custom_id="c")
    found = list(read_lines(io.BytesIO(content)))
    assert [(each.number, parse_line(each.content).custom_id) for each in found] == [(1, "a"), (4, "b"), (5, "c")]
    assert [json.loads(content[each.offset :].removeprefix(b"\xef\xbb\xbf").splitlines()[0])["custom_id"] for each in found] == [
        "a",
        "b",
        "c",
    ]


def test_a_line_that_is_too_long_is_one_bad_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BATCH_LINE_BYTES", 100)
    longest = line(body={"prompt": ""})
    longest = line(body={"prompt": "x" * (100 - len(longest))})
    assert len(longest) == 100
    found = list(read_lines(io.BytesIO(b"\n".join((longest, longest[:-1] + b" }", b"{" * 1000, longest)))))
    assert [len(each.content) for each in found] == [100, 101, 101, 100], "no more is kept of it"
    assert [each.number for each in found] == [1, 2, 3, 4]
    for each in found[::3]:
        parse_line(each.content)
    for each in found[1:3]:
        with pytest.raises(InvalidInput, match="longer than 100 bytes"):
            parse_line(each.content)


def test_a_custom_id_that_is_there_twice_names_both_lines() -> None:
    ids = CustomIds()
    ids.add("a", 1)
    ids.add("b", 2)
    with pytest.raises(InvalidInput, match="on line 1 and on line 3"):
        ids.add("a", 3)


def test_the_custom_id_of_a_bad_line_is_told_where_there_is_one() -> None:
    assert custom_id_of(line(url="/nowhere")) == "a"
    assert custom_id_of(b"{") is None
    assert custom_id_of(line(custom_id=3)) is None


def test_rows_are_one_line_of_json() -> None:
    row = answer_row('a"\n', 200, "r", b'{"x": "\\n"}')
    assert row.count(b"\n") == 1 and row.endswith(b"\n")
    made = json.loads(row)
    assert made["custom_id"] == 'a"\n'
    assert made["response"] == {"status_code": 200, "request_id": "r", "body": {"x": "\n"}}
    assert made["error"] is None
    error = json.loads(error_row(None, "invalid_url", "line 3: url: ...", 3, "url"))
    assert error["response"] is None
    assert error["error"] == {"code": "invalid_url", "message": "line 3: url: ...", "line": 3, "param": "url"}
