"""The lines of OpenAI's batch files: a request each, and an answer each. Pure.

    in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}}, "error": null}

A request that could not be run at all has no response but an error.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from splitfire.core import limits
from splitfire.core.errors import InvalidInput
from splitfire.core.strict_json import parse_object

URLS = ("/v1/chat/completions", "/v1/completions")
NAMES = ("custom_id", "method", "url", "body")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One that is not empty, without its end. Of one that is too long there is one byte more than may be."""

    number: int  # from 1
    offset: int  # of its first byte
    content: bytes


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks for."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """From where the file stands, which is the begin of line 1."""
    number, offset = 0, file.tell()
    while content := file.readline(limits.MAX_BATCH_LINE_BYTES + 2):
        number += 1
        begin, offset = offset, offset + len(content)
        while len(content) > limits.MAX_BATCH_LINE_BYTES and not content.endswith(b"\n"):
            rest = file.readline(limits.MAX_BATCH_LINE_BYTES)
            offset += len(rest)
            if not rest or rest.endswith(b"\n"):
                break
        if number == 1:
            content = content.removeprefix(BYTE_ORDER_MARK)
        if stripped := content.strip():
            yield Line(number, begin, stripped[: limits.MAX_BATCH_LINE_BYTES + 1])


def parse_line(content: bytes) -> BatchRequest:
    """InvalidInput names the field that is wrong."""
    if len(content) > limits.MAX_BATCH_LINE_BYTES:
        raise InvalidInput("line", f"is longer than {limits.MAX_BATCH_LINE_BYTES} bytes")
    given = parse_object(content, "line")
    for name in given:
        if name not in NAMES:
            raise InvalidInput(ascii(name[:40]).strip("'"), f"is not a field of a batch's line, which has {', '.join(NAMES)}")
    custom_id, url, body = given.get("custom_id"), given.get("url"), given.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= limits.MAX_CUSTOM_ID_CHARS:
        raise InvalidInput("custom_id", f"accepted: a string of 1 to {limits.MAX_CUSTOM_ID_CHARS} characters")
    if given.get("method") != "POST":
        raise InvalidInput("method", f"is {_shown(given.get('method'))}, accepted: POST")
    if not isinstance(url, str) or url not in URLS:
        raise InvalidInput("url", f"is {_shown(url)}, accepted: {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise InvalidInput("body", "must be a JSON object, what the request would be sent with")
    if body.get("stream"):
        raise InvalidInput("body.stream", "answers of a batch are not streamed; leave it out")
    return BatchRequest(custom_id, url, body)


def custom_id_of(content: bytes) -> str | None:
    """Of a line that may be wrong otherwise."""
    try:
        found = parse_object(content, "line").get("custom_id")
    except InvalidInput:
        return None
    return found if isinstance(found, str) and len(found) <= limits.MAX_CUSTOM_ID_CHARS else None


def digest_of(custom_id: str) -> bytes:
    """What is kept of one, where many are."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


class CustomIds:
    """Each is there once; about 150 bytes a line."""

    def __init__(self) -> None:
        self._lines: dict[bytes, int] = {}

    def add(self, custom_id: str, number: int) -> None:
        """InvalidInput that names both lines."""
        first = self._lines.setdefault(digest_of(custom_id), number)
        if first != number:
            message = f"{_shown(custom_id)} is on line {first} and on line {number}; give each request its own"
            raise InvalidInput("custom_id", message, reason="duplicate_custom_id")


ROW_ID = "batch_req_"
ROW_BEGINS = f'{{"id": "{ROW_ID}'.encode()  # every row that is made here


def answer_row(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """`body`: JSON in one line."""
    about = f'"status_code": {status}, "request_id": {json.dumps(request_id)}, "body": '
    head = f'{{"id": "{_row_id()}", "custom_id": {json.dumps(custom_id)}, "response": {{{about}'
    return head.encode() + body + b'}, "error": null}\n'


def error_row(custom_id: str | None, code: str, message: str, line: int | None = None, param: str | None = None) -> bytes:
    """Of a request that was not run."""
    error: dict[str, object] = {"code": code, "message": message}
    if line is not None:
        error |= {"line": line, "param": param}
    row = {"id": _row_id(), "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(row).encode() + b"\n"


def _row_id() -> str:
    return f"{ROW_ID}{secrets.token_hex(12)}"


def _shown(value: object) -> str:
    """A client's value inside a message: short, and with nothing that could break a line."""
    if value is None:
        return "missing"
    text = value if isinstance(value, str) else json.dumps(value)
    return ascii(text if len(text) <= 40 else text[:40] + "...")
