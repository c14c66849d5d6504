"""A process of the router's format pool: makes a grammar of a response format, and tries it. Killed when it takes too long.

Started as `python -m router.format_worker MODEL_DIR` by processes.py. Tried means: built with the bounds that workers have,
and asked for the tokens an output may begin with. It runs on a small stack, workers build it on a larger one: a grammar
nested so deeply that it breaks the stack does so here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from router.answering import Answer, serve
from router.gbnf import BadGrammar, read_gbnf
from router.lark import write_lark
from splitfire.core.errors import ModelError, one_line
from splitfire.core.limits import MAX_FORMAT_MEMORY_BYTES, MAX_GRAMMAR_CHARS
from splitfire.core.model_dir import ModelDir
from splitfire.core.response_format import JSON_TYPES, Kind, OutputGrammar, ResponseFormat
from splitfire.v1.inference_pb2 import ResponseFormat as Wire

STACK_BYTES = 4 << 20  # a worker's has sixteen times as much
# A blank, or a line break and some indentation: without a bound a weak model writes blanks until max_tokens.
JSON_STYLE = {"whitespace_flexible": True, "whitespace_pattern": r"[ \t]|\r?\n[ \t]{0,32}", "lenient": False}
NOTHING_FITS = "NoExtension"  # what the library calls it when no token may follow
MAX_SAID_CHARS = 300
# Places in what the client has not written: where in the library's grammar, and a piece of that.
_ITS_OWN = re.compile(r"^at \d+\(\d+\): |<non-verbose/>|\(in regex\)|\n *\d+ \|.*(\n *\^)?|in regex /.*/")


class BadFormat(Exception):
    """The response format cannot be kept to; the message says why."""


class FormatEngine:
    """What one model's tokens can be held to."""

    def __init__(self, model: ModelDir) -> None:
        eos = list(model.config.eos_token_ids)
        if not eos:
            raise ModelError("config.json: names no end-of-sequence token, without one an output cannot be ended")
        try:
            self._tokenizer = LLTokenizer(str(model.tokenizer_path), n_vocab=model.config.vocab_size, eos_token=eos)
        except BaseException as exc:  # the library panics with a BaseException of its own
            raise ModelError(f"tokenizer.json: {one_line(str(exc), 200)}") from exc
        self._eos = frozenset(eos)

    def compile(self, asked: ResponseFormat) -> OutputGrammar:
        """A grammar that workers can build. BadFormat if there is none."""
        grammar = OutputGrammar(asked.kind, lower(asked))
        if len(grammar.text) > MAX_GRAMMAR_CHARS:
            raise BadFormat(f"becomes a grammar of {len(grammar.text)} characters, limit {MAX_GRAMMAR_CHARS}; shorten it")
        bounds = LLParserLimits(**grammar.parser_limits, verbose_errors=False)  # type: ignore[arg-type]
        is_bad, messages = LLMatcher.validate_grammar_with_warnings(grammar.text, self._tokenizer, limits=bounds)
        if is_bad or messages:
            raise BadFormat(_said(messages[0]))
        matcher = LLMatcher(self._tokenizer, grammar.text, log_level=0, limits=bounds)
        mask = matcher.compute_bitmask()
        if matcher.is_error() and not matcher.get_error().startswith(NOTHING_FITS):
            raise BadFormat(_said(matcher.get_error()))
        begins = any(mask[i // 8] >> i % 8 & 1 for i in range(len(mask) * 8) if i not in self._eos)
        if matcher.is_error() or not begins:
            raise BadFormat("no text but the empty one matches it")
        return grammar


def lower(asked: ResponseFormat) -> str:
    """In llguidance's notation; what it means, and whether it can be kept to, is not looked at. BadFormat for bad GBNF."""
    if asked.kind in JSON_TYPES:
        return LLMatcher.grammar_from_json_schema(asked.source, overrides=JSON_STYLE)  # type: ignore[arg-type]
    if asked.kind == Wire.TYPE_REGEX:
        return LLMatcher.grammar_from_regex(asked.source)
    try:
        return LLMatcher.grammar_from_lark(write_lark(read_gbnf(asked.source)))
    except BadGrammar as exc:
        raise BadFormat(str(exc)) from exc


def _said(message: str) -> str:
    """The library's words as one line, without places in what the client has not written."""
    return one_line(" ".join(_ITS_OWN.sub("", message).split()), MAX_SAID_CHARS)


def load(path: Path) -> Callable[[Answer], Answer]:
    engine = FormatEngine(ModelDir(path))
    return lambda question: _on_small_stack(lambda: _answer(engine, question))


def _answer(engine: FormatEngine, question: Answer) -> Answer:
    try:
        return {"text": engine.compile(ResponseFormat(cast(Kind, question["kind"]), question["source"])).text}
    except BadFormat as exc:
        return {"bad": str(exc)}
    except RecursionError:
        return {"bad": "is nested too deeply"}
    except BaseException as exc:
        return {"bad": f"cannot be read: {type(exc).__name__}"}


def _on_small_stack(work: Callable[[], Answer]) -> Answer:
    answers: list[Answer] = []
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


if __name__ == "__main__":
    serve(load, MAX_FORMAT_MEMORY_BYTES)
