"""Bytes to JSON as RFC 8259 has it: UTF-8, one value for each name, finite numbers, not deeper than any request needs. Pure."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from splitfire.core.errors import InvalidInput

MAX_DEPTH = 64  # of arrays and objects within one another


def parse_object(body: bytes, what: str = "body") -> dict[str, Any]:
    """InvalidInput, which says of `what`, when it is anything but an object."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_not_a_number)
        if b"\\ud" in body or b"\\uD" in body:  # half of a pair of escapes is no character: nothing could be sent on
            json.dumps(value, ensure_ascii=False).encode()
        if not isinstance(value, dict):
            raise _Bad("must be a JSON object")
        _check_depth(value)
    except _Bad as exc:
        raise InvalidInput(what, str(exc), reason="invalid_json") from exc
    except UnicodeDecodeError as exc:
        raise InvalidInput(what, "is not UTF-8", reason="invalid_json") from exc
    except UnicodeEncodeError as exc:
        raise InvalidInput(what, "has half a surrogate pair, which is no character", reason="invalid_json") from exc
    except RecursionError as exc:
        raise InvalidInput(what, f"is nested deeper than {MAX_DEPTH}", reason="invalid_json") from exc
    except json.JSONDecodeError as exc:
        raise InvalidInput(what, f"is not JSON: {exc.msg} at character {exc.pos}", reason="invalid_json") from exc
    except ValueError as exc:  # an integer of thousands of digits
        raise InvalidInput(what, "has a number that is too long", reason="invalid_json") from exc
    return value


class _Bad(Exception):
    """JSON, but not as it is accepted here."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Bad(f"has {twice[:40]!a} twice in one object")
    return made


def _not_a_number(name: str) -> NoReturn:
    raise _Bad(f"has {name}, which is no JSON number")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one) if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _Bad(f"is nested deeper than {MAX_DEPTH}")
