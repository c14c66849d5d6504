"""A multipart/form-data upload, piece by piece: python-multipart parses, here is what a form may have. Pure.

Every part has one of a few names, and each name is there once, so there are never many. Nothing of them is kept but the values of fields,
which are short; the file's bytes are handed on as they come.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from splitfire.core import limits
from splitfire.core.errors import InvalidInput

logging.getLogger("python_multipart").addHandler(logging.NullHandler())  # what is wrong is told to whoever sent it
MAX_BOUNDARY_BYTES = 70  # RFC 2046
FILE = "file"
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass(slots=True)
class _Part:
    """The one that is being read."""

    header_name: bytes = b""
    header_value: bytes = b""
    disposition: bytes = b""
    name: str = ""


@dataclass(slots=True)
class Form:
    """`feed` all of it, then `end`. InvalidInput for whatever is wrong, as soon as it is seen."""

    content_type: str
    values: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    _part: _Part = field(default_factory=_Part)
    _names: set[str] = field(default_factory=set)
    _file: list[bytes] = field(default_factory=list)
    _is_whole: bool = False
    _parser: MultipartParser = field(init=False)

    def __post_init__(self) -> None:
        kind, options = parse_options_header(self.content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data":
            raise InvalidInput("body", "must be multipart/form-data, by its Content-Type", reason="content_type")
        if not 1 <= len(boundary) <= MAX_BOUNDARY_BYTES:
            raise _bad(f"its Content-Type names no boundary of 1 to {MAX_BOUNDARY_BYTES} characters")
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> bytes:
        """What of the file is in it."""
        try:
            self._parser.write(piece)
        except FormParserError as exc:
            raise _bad(f"is no multipart form: {exc}") from exc
        content = b"".join(self._file)
        self._file.clear()
        return content

    def end(self) -> None:
        """Whether it was all there."""
        if not self._is_whole:
            raise _bad("ends before its last boundary")
        for name in (FILE, "purpose"):
            if name not in self._names:
                raise InvalidInput(name, "is missing")

    # -- what the parser calls

    def _begin(self) -> None:
        self._part = _Part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.header_value += data[start:end]

    def _header_end(self) -> None:
        part = self._part
        if part.header_name.lower() == b"content-disposition":
            if part.disposition:
                raise _bad("has a part with two Content-Dispositions")
            part.disposition = part.header_value
        part.header_name = part.header_value = b""

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._part.disposition.decode("latin-1"))
        if kind != b"form-data" or b"name" not in options:
            raise _bad("has a part without a name")
        name = self._part.name = _text(options[b"name"], "a part's name", limits.MAX_FORM_VALUE_BYTES)
        if name in self._names:
            raise InvalidInput(name, "is there twice")
        if name == FILE:
            self.filename = _file_name(options.get(b"filename", b""))
        elif name in FIELDS:
            self.values[name] = ""
        else:
            raise InvalidInput(ascii(name[:40]).strip("'"), "is not a parameter of this API")
        self._names.add(name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        name = self._part.name
        if name == FILE:
            self._file.append(data[start:end])
            return
        self.values[name] += _text(data[start:end], name, limits.MAX_FORM_VALUE_BYTES)
        if len(self.values[name]) > limits.MAX_FORM_VALUE_BYTES:
            raise InvalidInput(name, f"is longer than {limits.MAX_FORM_VALUE_BYTES} bytes")

    def _end(self) -> None:
        self._is_whole = True


def _file_name(given: bytes) -> str:
    """What the client calls it: shown to him again, and nothing more."""
    name = _text(given, "file.filename", 4 * limits.MAX_FILE_NAME_CHARS)
    if not name.isprintable() or len(name) > limits.MAX_FILE_NAME_CHARS or any(c in name for c in "/\\"):
        raise InvalidInput(
            "file.filename", f"accepted: a name of at most {limits.MAX_FILE_NAME_CHARS} printable characters, not a path"
        )
    return name or "upload.jsonl"


def _text(data: bytes, what: str, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise InvalidInput(what, f"is longer than {max_bytes} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise InvalidInput(what, "is not UTF-8") from exc


def _bad(message: str) -> InvalidInput:
    return InvalidInput("body", message, reason="invalid_form")
