"""Writes rules as llguidance's Lark. Pure; used in a process that may be killed (format_worker.py).

What refers to no rule that refers to itself is a regular expression, however it was spread over rules, and becomes one
terminal, which matches exactly. In rules that do refer to themselves the longest stretches without such references become
terminals, and a terminal takes as much as it can, as tokens do in any parser with a lexer. So the output is always one that
the grammar derives, but where such a stretch could also end earlier, not every one that it derives can come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, groupby

from router.gbnf import ROOT, Chain, Choice, Node, Pattern, Reference, Repeat, references


def write_lark(rules: Mapping[str, Node]) -> str:
    return _Writer(rules).lark()


class _Writer:
    """The Lark of a grammar: `start`, rules r0, r1, ... and terminals T0, T1, ..."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self._rules = rules
        self._regular = _regular_rules(rules)
        self._names: dict[str, str] = {}
        self._to_write: list[str] = []
        self._lines: list[str] = []
        self._num_terminals = 0

    def lark(self) -> str:
        self._lines.append(f"start: {self._refer(ROOT)}")
        while self._to_write:
            rule = self._to_write.pop()
            text = self._terminal_text if rule in self._regular else self._rule_text
            self._lines.append(f"{self._names[rule]}: {text(self._rules[rule])}")
        return "\n".join(self._lines) + "\n"

    def _refer(self, rule: str) -> str:
        """What stands for a rule; it is written when it is first asked for."""
        if rule not in self._names:
            self._names[rule] = self._new_terminal() if rule in self._regular else f"r{len(self._names)}"
            self._to_write.append(rule)
        return self._names[rule]

    def _new_terminal(self) -> str:
        self._num_terminals += 1
        return f"T{self._num_terminals - 1}"

    def _terminal_text(self, node: Node) -> str:
        match node:
            case Pattern(regex):
                return f"/{regex}/"
            case Reference(name):
                return self._refer(name)
            case Chain(parts):
                return " ".join(map(self._terminal_text, parts)) or '""'
            case Choice(parts):
                return f"({' | '.join(map(self._terminal_text, parts))})"
            case Repeat(inner):
                return f"({self._terminal_text(inner)}){_times(node)}"

    def _rule_text(self, node: Node) -> str:
        if self._is_regular(node):
            return self._refer(node.name) if isinstance(node, Reference) else self._anonymous(node)
        match node:
            case Reference(name):
                return self._refer(name)
            case Chain(parts):
                runs = ((regular, tuple(run)) for regular, run in groupby(parts, self._is_regular))
                texts = ([self._rule_text(Chain(run))] if regular else map(self._rule_text, run) for regular, run in runs)
                return " ".join(chain.from_iterable(texts))
            case Choice(parts):
                regular = tuple(part for part in parts if self._is_regular(part))
                others = [part for part in parts if not self._is_regular(part)]
                return f"({' | '.join(map(self._rule_text, [Choice(regular), *others] if regular else others))})"
            case Repeat(inner):
                return f"({self._rule_text(inner)}){_times(node)}"
            case Pattern():
                raise AssertionError("a pattern is regular")

    def _anonymous(self, node: Node) -> str:
        name = self._new_terminal()
        self._lines.append(f"{name}: {self._terminal_text(node)}")
        return name

    def _is_regular(self, node: Node) -> bool:
        return all(name in self._regular for name in references(node))


def _regular_rules(rules: Mapping[str, Node]) -> set[str]:
    """Those from which no rule can be reached that refers to itself, however indirectly."""
    needs = {name: set(references(node)) for name, node in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, wanted in needs.items():
        for other in wanted:
            users[other].append(name)
    ready = [name for name, wanted in needs.items() if not wanted]
    regular: set[str] = set()
    while ready:
        name = ready.pop()
        regular.add(name)
        for user in users[name]:
            needs[user].discard(name)
            if not needs[user]:
                ready.append(user)
    return regular


def _times(node: Repeat) -> str:
    return f"{{{node.least},{'' if node.most is None else node.most}}}"
