"""What an output must match: as the client says it (`ResponseFormat`), and as workers are told (`OutputGrammar`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from splitfire.core import limits
from splitfire.core.errors import InvalidInput
from splitfire.core.ranges import require
from splitfire.v1 import inference_pb2 as pb

Kind: TypeAlias = "pb.ResponseFormat.Type.ValueType"
SOURCES: Mapping[Kind, str] = {
    pb.ResponseFormat.TYPE_JSON_SCHEMA: "json_schema",
    pb.ResponseFormat.TYPE_REGEX: "regex",
    pb.ResponseFormat.TYPE_GRAMMAR: "grammar",
}
JSON_TYPES = (pb.ResponseFormat.TYPE_JSON_OBJECT, pb.ResponseFormat.TYPE_JSON_SCHEMA)
ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A schema, a regular expression or a GBNF grammar, of bounded size; whether it means anything is not known yet."""

    kind: Kind
    source: str

    @property
    def field(self) -> str:
        """What an error is to name."""
        name = SOURCES.get(self.kind)
        return f"response_format.{name}" if name else "response_format"


@dataclass(frozen=True, slots=True)
class OutputGrammar:
    """A grammar in llguidance's notation, made of a response format and tried."""

    kind: Kind
    text: str

    @property
    def parser_limits(self) -> dict[str, int]:
        """Bounds of building and matching it, by llguidance's names; the same wherever it is built."""
        return {
            "max_items_in_row": limits.MAX_ROW_ITEMS_JSON if self.kind in JSON_TYPES else limits.MAX_ROW_ITEMS,
            "initial_lexer_fuel": limits.MAX_GRAMMAR_FUEL,
            "step_lexer_fuel": limits.MAX_STEP_FUEL,
            "step_max_items": limits.MAX_STEP_ITEMS,
            "max_lexer_states": limits.MAX_LEXER_STATES,
            "max_grammar_size": limits.MAX_GRAMMAR_SYMBOLS,
        }


def read_response_format(asked: pb.ResponseFormat) -> ResponseFormat | None:
    """None: any text. Checks what can be seen from outside: sizes, nesting, that a schema is JSON."""
    if asked.type not in pb.ResponseFormat.Type.values():
        accepted = ", ".join(pb.ResponseFormat.Type.keys()[1:])
        raise InvalidInput("response_format.type", f"is {asked.type}, accepted: {accepted}")
    for kind, name in SOURCES.items():
        text = getattr(asked, name)
        if kind != asked.type and text:
            raise InvalidInput(f"response_format.{name}", f"only goes with {pb.ResponseFormat.Type.Name(kind)}")
        if kind == asked.type:
            most = limits.MAX_FORMAT_CHARS
            require(1 <= len(text) <= most, f"response_format.{name}", f"{len(text)} characters long", f"1 to {most}")
    if asked.type == pb.ResponseFormat.TYPE_JSON_SCHEMA:
        _check_schema(asked.json_schema)
    if asked.type == pb.ResponseFormat.TYPE_JSON_OBJECT:
        return ResponseFormat(asked.type, ANY_OBJECT)
    return ResponseFormat(asked.type, getattr(asked, SOURCES[asked.type])) if asked.type in SOURCES else None


def _check_schema(text: str) -> None:
    field, most = "response_format.json_schema", limits.MAX_FORMAT_NESTING
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidInput(field, f"is nested deeper than {most}") from None
    except ValueError as exc:
        raise InvalidInput(field, f"is not JSON: {exc}") from None
    if not isinstance(schema, dict):
        raise InvalidInput(field, "is not an object")
    level: list[Any] = [schema]
    for _ in range(most):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _members(outer)]
    if any(isinstance(inner, dict | list) for inner in level):
        raise InvalidInput(field, f"is nested deeper than {most}")


def _members(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
