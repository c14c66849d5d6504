"""Reads GBNF (EBNF as llama.cpp has it) into rules. Pure; used in a process that may be killed (format_worker.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

ROOT = "root"
MAX_NESTING = 100
MAX_REPEATS = 100_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_BLANKS = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_REPEATS = re.compile(r"\{[ \t]*([0-9]{1,9})[ \t]*(,[ \t]*([0-9]{1,9})?[ \t]*)?\}")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "'": "'", "[": "[", "]": "]", "-": "-", "^": "^", "/": "/"}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class BadGrammar(ValueError):
    """The grammar cannot be read; the message says where."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression in Rust's syntax, without a slash."""

    regex: str


@dataclass(frozen=True, slots=True)
class Reference:
    """Whatever the rule of that name derives."""

    name: str


@dataclass(frozen=True, slots=True)
class Chain:
    """One after another; none of them: the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of them."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` to `most` times; None: any number."""

    node: Node
    least: int
    most: int | None


Node: TypeAlias = Pattern | Reference | Chain | Choice | Repeat


def read_gbnf(source: str) -> dict[str, Node]:
    """Its rules, among them `root`; every reference is to one of them. BadGrammar, with line and column, if it cannot be read."""
    return _Reader(source).rules()


def references(node: Node) -> Iterator[str]:
    """Names of the rules it refers to."""
    match node:
        case Reference(name):
            yield name
        case Chain(parts) | Choice(parts):
            for part in parts:
                yield from references(part)
        case Repeat(inner):
            yield from references(inner)
        case Pattern():
            return


class _Reader:
    """A grammar's text, from left to right."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._skip(_BLANKS)
        while self._at < len(self._source):
            name = self._rule_name()
            if name is None:
                raise self._error("expected a rule, such as: name ::= ...")
            if name in rules:
                raise self._error(f"the rule {name} is there twice")
            rules[name] = self._choice()
        if ROOT not in rules:
            raise self._error(f"no rule is named {ROOT}")
        missing = sorted({name for node in rules.values() for name in references(node)} - rules.keys())
        if missing:
            raise self._error(f"no rule is named {missing[0][:40]}")
        return rules

    def _choice(self) -> Node:
        parts = [self._chain()]
        while self._take("|"):
            parts.append(self._chain())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _chain(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)" and not self._is_rule():
            parts.append(self._repeated(self._item()))
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def _item(self) -> Node:
        if self._take("("):
            self._depth += 1
            if self._depth > MAX_NESTING:
                raise self._error(f"parentheses are nested deeper than {MAX_NESTING}")
            node = self._choice()
            if not self._take(")"):
                raise self._error("expected )")
            self._depth -= 1
            return node
        if self._source[self._at] == '"':
            return self._literal()
        if self._source[self._at] == "[":
            return self._class()
        if self._take("."):
            return Pattern("(?s:.)")
        name = self._skip(_NAME)
        if not name:
            raise self._error("expected a name, a text in quotes, a class in brackets or a group in parentheses")
        self._skip(_BLANKS)
        return Reference(name)

    def _repeated(self, node: Node) -> Node:
        """With every `*`, `+`, `?` and `{}` that follows."""
        for _ in range(MAX_NESTING):
            counts = _REPEATS.match(self._source, self._at)
            if counts:
                least = int(counts[1])
                most = least if counts[2] is None else int(counts[3]) if counts[3] else None
                if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
                    raise self._error(f"expected repeats of 0 to {MAX_REPEATS}, the smaller number first")
                self._skip(_REPEATS)
                self._skip(_BLANKS)
                node = Repeat(node, least, most)
            elif self._take("*"):
                node = Repeat(node, 0, None)
            elif self._take("+"):
                node = Repeat(node, 1, None)
            elif self._take("?"):
                node = Repeat(node, 0, 1)
            else:
                return node
        raise self._error(f"more than {MAX_NESTING} repeats of repeats")

    def _literal(self) -> Node:
        self._at += 1
        regex = ""
        while self._peek() != '"':
            regex += _quoted(self._character())
        self._at += 1
        self._skip(_BLANKS)
        return Pattern(regex) if regex else Chain(())

    def _class(self) -> Node:
        self._at += 1
        regex = "[^" if self._peek() == "^" else "["
        self._at += regex == "[^"
        num_ranges = 0
        while self._peek() != "]":
            first = last = self._character()
            if self._peek() == "-" and self._source[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._character()
                if last < first:
                    raise self._error("a range in brackets goes from the smaller to the larger character")
            regex += _quoted(first) + "-" + _quoted(last) if last != first else _quoted(first)
            num_ranges += 1
        if not num_ranges:
            raise self._error("brackets with nothing between them")
        self._at += 1
        self._skip(_BLANKS)
        return Pattern(regex + "]")

    def _character(self) -> str:
        """The next one, escaped or not."""
        char = self._peek()
        self._at += 1
        if char != "\\":
            return char
        kind = self._peek()
        self._at += 1
        if kind in _ESCAPED:
            return _ESCAPED[kind]
        if kind in _HEX_DIGITS:
            digits = self._source[self._at : self._at + _HEX_DIGITS[kind]]
            if re.fullmatch(r"[0-9A-Fa-f]+", digits) and len(digits) == _HEX_DIGITS[kind]:
                code = int(digits, 16)
                if code < 0x110000 and not 0xD800 <= code < 0xE000:
                    self._at += len(digits)
                    return chr(code)
        raise self._error("not an escaped character")

    def _peek(self) -> str:
        if self._at >= len(self._source):
            raise self._error("the grammar ends inside quotes or brackets")
        return self._source[self._at]

    def _take(self, char: str) -> bool:
        """Whether `char` is next; then it and what is blank after it is passed."""
        if not self._source.startswith(char, self._at):
            return False
        self._at += 1
        self._skip(_BLANKS)
        return True

    def _skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._source, self._at)
        self._at = found.end() if found else self._at
        return found[0] if found else ""

    def _is_rule(self) -> bool:
        begin = self._at
        is_rule = self._rule_name() is not None
        self._at = begin
        return is_rule

    def _rule_name(self) -> str | None:
        """Passes `name ::=` if that is next."""
        begin = self._at
        name = self._skip(_NAME)
        self._skip(_BLANKS)
        if name and self._source.startswith("::=", self._at):
            self._at += 3
            self._skip(_BLANKS)
            return name
        self._at = begin
        return None

    def _error(self, what: str) -> BadGrammar:
        before = self._source[: self._at]
        return BadGrammar(f"line {before.count(chr(10)) + 1}, column {self._at - before.rfind(chr(10))}: {what}")


def _quoted(char: str) -> str:
    """A character in a regular expression, inside brackets or not."""
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):X}}}"
