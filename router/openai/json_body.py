"""Bytes to JSON as RFC 8259 has it: UTF-8, one value for each name, finite numbers, not deeper than any request needs. Pure."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from splitfire.core.errors import InvalidInput

MAX_DEPTH = 64  # of arrays and objects within one another


def parse_object(body: bytes) -> dict[str, Any]:
    """InvalidInput when it is anything but an object."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_not_a_number)
    except UnicodeDecodeError as exc:
        raise _bad("is not UTF-8") from exc
    except RecursionError as exc:
        raise _bad(f"is nested deeper than {MAX_DEPTH}") from exc
    except json.JSONDecodeError as exc:
        raise _bad(f"is not JSON: {exc.msg} at character {exc.pos}") from exc
    except ValueError as exc:  # an integer of thousands of digits
        raise _bad("has a number that is too long") from exc
    if not isinstance(value, dict):
        raise _bad("must be a JSON object")
    _check_depth(value)
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _bad(f"has {twice[:40]!a} twice in one object")
    return made


def _not_a_number(name: str) -> NoReturn:
    raise _bad(f"has {name}, which is no JSON number")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner for one in level for inner in (one.values() if isinstance(one, dict) else one) if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _bad(f"is nested deeper than {MAX_DEPTH}")


def _bad(message: str) -> InvalidInput:
    return InvalidInput("body", message, reason="invalid_json")
