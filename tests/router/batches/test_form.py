"""Multipart forms, in pieces of any size: an upload is read, what is hostile is refused before it costs anything."""

from __future__ import annotations

import time

import pytest

from router.batches.form import Form
from splitfire.core import limits
from splitfire.core.errors import InvalidInput

KIND = 'multipart/form-data; boundary="b"'
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
END = b"--b--\r\n"


def part(name: str, value: bytes = b"x") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)


def read(body: bytes, size: int = 1 << 16, kind: str = KIND) -> tuple[Form, bytes]:
    form, content = Form(kind), b""
    for begin in range(0, len(body), size):
        content += form.feed(body[begin : begin + size])
    form.end()
    return form, content


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("content", [b"a\nb\n", b"", b"\r\n--", b"\r\n--b", b"--b--\r\n", b"\0\xff" * 50])
def test_a_file_is_what_was_sent(content: bytes, size: int) -> None:
    expected = b"" if content == b"--b--\r\n" else content
    if b"\r\n--b" in b"\r\n" + content:
        content = content.replace(b"--b", b"-b")
        expected = content
    form, found = read(PURPOSE + HEAD + content + b"\r\n" + END, size)
    assert found == expected
    assert form.values == {"purpose": "batch"}
    assert form.filename == "in.jsonl"


def test_the_file_may_come_first_and_end_in_an_epilogue() -> None:
    form, content = read(
        HEAD + b"abc\r\n" + PURPOSE + part("expires_after[anchor]") + part("expires_after[seconds]", b"3600") + END + b"bye"
    )
    assert content == b"abc"
    assert form.values["expires_after[seconds]"] == "3600"


@pytest.mark.parametrize(
    "kind",
    [
        *("", "application/json", "multipart/mixed; boundary=b", "multipart/form-data", "multipart/form-data; boundary="),
        "multipart/form-data; boundary=" + "b" * 71,
    ],
)
def test_without_a_boundary_there_is_no_form(kind: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Form(kind)
    assert caught.value.reason in ("content_type", "invalid_form")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"nonsense", "body"),
        (PURPOSE + HEAD + b"abc", "body"),  # never ends
        (END, "file"),
        (PURPOSE + END, "file"),
        (HEAD + b"abc\r\n" + END, "purpose"),
        (PURPOSE + PURPOSE + HEAD + b"abc\r\n" + END, "purpose"),
        (HEAD + b"abc\r\n" + HEAD + b"abc\r\n" + PURPOSE + END, "file"),
        (part("purpose", b"x" * 300), "purpose"),
        (part("purpose", b"\xff"), "purpose"),
        (part("model"), "model"),
        (part("file[0]"), "file[0]"),
        (part("\xe9" * 300), "a part's name"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, "body"),
        (b"--b\r\nContent-Disposition: attachment; name=purpose\r\n\r\nx\r\n" + END, "body"),
        (b"--b\r\n\r\nx\r\n" + END, "body"),
        (
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n'
            + END,
            "body",
        ),
        (b"--b\r\nX: " + b"a" * 10_000 + b"\r\n\r\nx\r\n", "body"),
        (b"--b\r\n" + b"X: a\r\n" * 100 + b"\r\nx\r\n", "body"),
        (HEAD.replace(b"in.jsonl", b"../../etc/passwd"), "file.filename"),
        (HEAD.replace(b"in.jsonl", b"a\\\\b"), "file.filename"),
        (HEAD.replace(b"in.jsonl", b"a\x1b[2J"), "file.filename"),
        (HEAD.replace(b"in.jsonl", b"a" * 256), "file.filename"),
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 16])
def test_what_is_wrong_is_named(body: bytes, field: str, size: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(body, size)
    assert caught.value.field == field


def test_a_hundred_thousand_parts_end_after_a_few() -> None:
    body = b"".join(part(name) for name in ("purpose", *(f"expires_after[{i}]" for i in range(10**5))))
    began = time.monotonic()
    with pytest.raises(InvalidInput):
        read(body)
    form = Form(KIND)
    with pytest.raises(InvalidInput):
        for _ in range(10**5):
            form.feed(b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\n\r\n")
    assert time.monotonic() - began < 1


def test_a_name_of_a_file_may_be_in_any_script() -> None:
    form, _ = read(PURPOSE + HEAD.replace(b"in.jsonl", "漢字 1.jsonl".encode()) + b"abc\r\n" + END)
    assert form.filename == "漢字 1.jsonl"
    assert len(form.filename) < limits.MAX_FILE_NAME_CHARS
