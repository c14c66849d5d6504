"""Bytes to messages and back, for services whose handlers are registered by hand: bytes that are no message get an honest INVALID_ARGUMENT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from splitfire.core.errors import InvalidInput

Request = TypeVar("Request", bound=Message)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not the message the method takes."""


def parser(kind: type[Request]) -> Callable[[bytes], Request | Malformed]:
    def parse(data: bytes) -> Request | Malformed:
        try:
            return kind.FromString(data)
        except (DecodeError, RecursionError):
            return Malformed()

    return parse


def serialize(message: Message) -> bytes:
    return message.SerializeToString()


def well_formed(request: Request | Malformed) -> Request:
    """InvalidInput when it is not."""
    if isinstance(request, Malformed):
        raise InvalidInput(
            "request", "is not a valid message: wrong wire types, or text that is not UTF-8", reason="invalid_message"
        )
    return request
