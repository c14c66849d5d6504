"""Calls of tools in what a model writes. Pure.

    Free      tools may be called: `<tool_call>{...}</tool_call>` (Hermes, Qwen), or an answer that is nothing but calls in JSON (Llama 3,
              Mistral, whose marks are special tokens and have no text)
    Forced    the answer is one call, held to a schema of all tools
    Named     the answer is the arguments of one tool

What looks like a call and is none stays text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a call: its name with the first, JSON of its arguments in all together."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Said:
    """What some text turned out to be."""

    text: str = ""
    calls: tuple[CallPart, ...] = ()


class Reader(Protocol):
    """Reads one answer as it comes."""

    def push(self, text: str) -> Said: ...

    def end(self) -> Said:
        """What was held back."""


class Plain:
    """No tools: all is text."""

    def push(self, text: str) -> Said:
        return Said(text)

    def end(self) -> Said:
        return Said()


@dataclass
class Named:
    """All is the arguments of this tool."""

    name: str
    _has_begun: bool = False

    def push(self, text: str) -> Said:
        part = CallPart(0, None if self._has_begun else self.name, text)
        self._has_begun = True
        return Said("", (part,))

    def end(self) -> Said:
        return Said()


@dataclass
class Forced:
    """One call, whole at the end; text where it was cut short."""

    names: Collection[str]
    _held: str = ""

    def push(self, text: str) -> Said:
        self._held += text
        return Said()

    def end(self) -> Said:
        calls = _calls_in(self._held, self.names)
        return Said("", _parts(calls, 0)) if calls else Said(self._held)


@dataclass
class Free:
    """Text with calls in it."""

    names: Collection[str]
    _held: str = ""
    _num_calls: int = 0
    _is_bare: bool | None = None  # the answer begins as JSON; None: it has not begun

    def push(self, text: str) -> Said:
        self._held += text
        if self._is_bare is None:
            begun = self._held.lstrip()
            if not begun:
                return Said()
            self._is_bare = begun[0] in "{["
        return Said() if self._is_bare else self._tagged(is_end=False)

    def end(self) -> Said:
        if not self._is_bare:
            return self._tagged(is_end=True)
        calls = _calls_in(self._held, self.names)
        return Said("", _parts(calls, self._num_calls)) if calls else Said(self._held)

    def _tagged(self, *, is_end: bool) -> Said:
        """What is certain of what is held. Lines that end before a call belong to nothing."""
        text, parts = "", list[CallPart]()
        while True:
            before, opened, rest = self._held.partition(OPEN)
            body, closed, after = rest.partition(CLOSE)
            if not opened or not (closed or is_end):
                break
            calls = _calls_in(body, self.names)
            text += before.rstrip("\n") if calls else before + opened + body + closed
            parts += _parts(calls, self._num_calls)
            self._num_calls += len(calls)
            self._held = after.lstrip("\n") if calls else after
        if not is_end:
            certain = before if opened else before[: len(before) - _overlap(before, OPEN)]
            certain = certain.rstrip("\n")
        else:
            certain = before.rstrip("\n") if self._num_calls else before
        self._held = self._held[len(certain) :] if not is_end else ""
        return Said(text + certain, tuple(parts))


def call_schema(tools: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Of one call of any of these: names and schemas of parameters."""
    each = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in tools
    ]
    return each[0] if len(each) == 1 else {"anyOf": each}


def _calls_in(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Names and arguments, if it is nothing but calls of tools there are."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or one["name"] not in names:
            return []
        arguments = one.get("arguments", one.get("parameters", {}))
        calls.append((one["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)))
    return calls


def _parts(calls: Sequence[tuple[str, str]], first: int) -> tuple[CallPart, ...]:
    return tuple(CallPart(first + i, name, arguments) for i, (name, arguments) in enumerate(calls))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((length for length in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:length])), 0)
