"""Grammars for tests: made and tried like the router does, built like a worker does, for pico's tokens."""

from __future__ import annotations

import json
from functools import lru_cache

from router.format_worker import FormatEngine
from splitfire.core.model_dir import ModelDir
from splitfire.core.response_format import OutputGrammar, ResponseFormat
from splitfire.engine.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import PICO

SCHEMA, REGEX, GRAMMAR = pb.ResponseFormat.TYPE_JSON_SCHEMA, pb.ResponseFormat.TYPE_REGEX, pb.ResponseFormat.TYPE_GRAMMAR
EOS = frozenset(ModelDir(PICO).config.eos_token_ids)

PERSON: dict[str, object] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,6}$"}, "minItems": 1, "maxItems": 3},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -9, "maximum": 9}, "ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "kind", "tags", "at"],
    "additionalProperties": False,
}
SMALL: dict[str, object] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 5}, "word": {"type": "string", "pattern": "^[a-z]{2,5}$"}},
    "required": ["n", "word"],
    "additionalProperties": False,
}
ARITHMETIC = r"""
root ::= sum
sum  ::= term (("+" | "-") term){0,3}   # a sum calls itself through terms
term ::= [1-9] [0-9]{0,3} | "(" sum ")"
"""


@lru_cache(maxsize=1)
def _engine() -> FormatEngine:
    return FormatEngine(ModelDir(PICO))


@lru_cache(maxsize=1)
def compiler() -> GrammarCompiler:
    model = ModelDir(PICO)
    return GrammarCompiler(model.tokenizer_path, model.config.vocab_size, model.config.eos_token_ids)


def output_grammar(kind: pb.ResponseFormat.Type.ValueType, source: str | dict[str, object]) -> OutputGrammar:
    return _engine().compile(ResponseFormat(kind, source if isinstance(source, str) else json.dumps(source)))


def compiled(kind: pb.ResponseFormat.Type.ValueType, source: str | dict[str, object]) -> CompiledGrammar:
    return compiler().compile(output_grammar(kind, source))


def regex(source: str) -> GrammarState:
    return compiled(REGEX, source).start((), EOS)


def is_person(text: str) -> bool:
    """What PERSON says, written by hand."""
    person = json.loads(text)
    name, age, kind, tags, at = (person[key] for key in ("name", "age", "kind", "tags", "at"))
    assert len(person) == 5
    assert isinstance(name, str) and 1 <= len(name) <= 12
    assert isinstance(age, int) and 0 <= age <= 150
    assert kind in ("cat", "dog", None)
    assert isinstance(tags, list) and 1 <= len(tags) <= 3
    assert all(tag.isascii() and tag.isalpha() and tag.islower() and len(tag) <= 6 for tag in tags)
    assert isinstance(at["ok"], bool) and isinstance(at.get("x", 0), int | float)
    return True
