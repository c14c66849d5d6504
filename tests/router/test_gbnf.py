"""GBNF means the same after it was written as Lark; what is not GBNF is refused with its place."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from router.gbnf import MAX_NESTING, MAX_REPEATS, BadGrammar, Chain, Choice, Node, Pattern, Reference, Repeat, read_gbnf
from router.lark import write_lark
from tests.checkpoints import PICO, VOCAB


@lru_cache(maxsize=1)
def tokens() -> tuple[LLTokenizer, Tokenizer]:
    path = str(PICO / "tokenizer.json")
    return LLTokenizer(path, n_vocab=VOCAB, eos_token=0), Tokenizer.from_file(path)


def matcher(gbnf: str) -> LLMatcher:
    made = LLMatcher(tokens()[0], LLMatcher.grammar_from_lark(write_lark(read_gbnf(gbnf))), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def matches(gbnf: str, text: str) -> bool:
    made = matcher(gbnf)
    ids = tokens()[1].encode(text, add_special_tokens=False).ids
    return made.try_consume_tokens(ids) == len(ids) and bool(made.is_accepting())


@pytest.mark.parametrize(
    ("gbnf", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "yesno", "maybe"]),
        ('# a comment\nroot ::= a b?  # and one more\na ::= "x"\n  | "y"\nb ::= [0-9]+', ["x", "y12"], ["12", "xy"]),
        (r'root ::= "\x41\u00e9\U0001F642\n\t\"\\" "\[\]"', ['Aé🙂\n\t"\\[]'], ["A"]),
        (r"root ::= [^a-c\]\n]{2,3}", ["dd", "é🙂-"], ["d", "da", "]]", "d\n"]),
        ("root ::= [-a] [a-] [\\^x]", ["-a^", "a-x"], ["ab^"]),
        ("root ::= .{3}", ["abc", "\n\n\n", "🙂é "], ["ab", "abcd"]),
        ('root ::= ( "a" | "b" ( "c" | ) ){2}', ["aa", "bcb", "abc"], ["a", "ac"]),
        ('root ::= "(" root ")" | "x" | ', ["x", "((x))", "()", ""], ["(", "(x", "x)"]),
        ('root ::= sum\nsum ::= sum "+" term | term\nterm ::= [0-9]+ | "(" sum ")"', ["1", "1+(22+3)"], ["1+", "()"]),
        ('root ::= list\nlist ::= "[" (item ("," item)*)? "]"\nitem ::= [a-z]+ | list', ["[]", "[a,[b,c],d]"], ["[a", "a", "[,]"]),
        ('root ::= a-b_1 tail\na-b_1 ::= "q"\ntail ::= "" | "!" tail', ["q", "q!!"], ["!"]),
        ('root ::= [a-z]* "abc"', ["abc", "xxabc", "abcabc"], ["xx", "abcd"]),
        ('root ::= "/" "//" [/]', ["////"], ["//"]),
    ],
)
def test_it_derives_what_it_says(gbnf: str, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert matches(gbnf, text), text
    for text in bad:
        assert not matches(gbnf, text), text


@pytest.mark.parametrize(
    ("gbnf", "says"),
    [
        ("", "line 1, column 1: no rule is named root"),
        ('x ::= "a"', "no rule is named root"),
        ("root ::= y", "no rule is named y"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 10: the rule root is there twice"),
        ("root := x", "line 1, column 1: expected a rule"),
        ('root ::= "a', "ends inside quotes"),
        ("root ::= [a", "ends inside quotes or brackets"),
        ("root ::= []", "nothing between"),
        ("root ::= [z-a]", "smaller to the larger"),
        ('root ::= ("a"', "column 14: expected )"),
        ('root ::= "a" )', "column 14: expected a rule"),
        ('root ::= "a"\n  $', "line 2, column 3: expected a name"),
        ('root ::= "\\q"', "escaped"),
        ('root ::= "\\u12"', "escaped"),
        ('root ::= "\\uD800"', "escaped"),
        ('root ::= "\\U00110000"', "escaped"),
        ('root ::= "a"{3,2}', "smaller number first"),
        (f'root ::= "a"{{{MAX_REPEATS + 1}}}', f"0 to {MAX_REPEATS}"),
        ("root ::= *", "expected a name"),
        ("root ::= " + "(" * (MAX_NESTING + 1) + '"a"' + ")" * (MAX_NESTING + 1), f"deeper than {MAX_NESTING}"),
        ('root ::= "a"' + "*" * 60_000, "repeats of repeats"),
    ],
)
def test_what_is_no_gbnf_is_refused_with_its_place(gbnf: str, says: str) -> None:
    with pytest.raises(BadGrammar) as caught:
        read_gbnf(gbnf)
    assert says in str(caught.value)


def test_parentheses_at_the_limit_are_read() -> None:
    assert matches("root ::= " + "(" * MAX_NESTING + '"a"' + ")" * MAX_NESTING, "a")


def test_reading_takes_linear_time() -> None:
    many = "root ::= " + " | ".join(f'"w{i}"' for i in range(6000))
    assert len(read_gbnf(many)) == 1
    rules = "\n".join(f"r{i} ::= r{i + 1}" for i in range(4000)) + '\nr4000 ::= "a"\nroot ::= r0'
    assert write_lark(read_gbnf(rules)).count("\n") == 4003


LETTERS = "abé/"
patterns = st.builds(Pattern, st.sampled_from(["a", "b", "ab", "[a-b]", "[^a]", r"\x{E9}", r"\x{2F}"]))


def nodes(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    parts = st.lists(inner, min_size=0, max_size=3).map(tuple)
    return st.one_of(
        st.builds(Chain, parts),
        st.builds(Choice, st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Repeat, inner, st.integers(0, 2), st.sampled_from([None, 2, 3])),
        st.just(Reference("other")),
    )


def as_python(node: Node, other: Node) -> str:
    match node:
        case Pattern(regex):
            return "(?:" + regex.replace(r"\x{E9}", "é").replace(r"\x{2F}", "/") + ")"
        case Reference():
            return as_python(other, other)
        case Chain(parts):
            return "(?:" + "".join(as_python(part, other) for part in parts) + ")"
        case Choice(parts):
            return "(?:" + "|".join(as_python(part, other) for part in parts) + ")"
        case Repeat(inner, least, most):
            return f"(?:{as_python(inner, other)}){{{least},{'' if most is None else most}}}"


@settings(max_examples=150, deadline=None)
@given(
    root=st.recursive(patterns, nodes, max_leaves=8),
    other=st.recursive(patterns, lambda x: nodes(x).filter(bool), max_leaves=3),
    data=st.data(),
)
def test_without_recursion_it_is_the_regular_expression_it_looks_like(root: Node, other: Node, data: st.DataObject) -> None:
    if "Reference" in repr(other):
        other = Pattern("ab")
    lark = write_lark({"root": root, "other": other})
    made = LLMatcher(tokens()[0], LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not made.is_error(), made.get_error()
    expected = re.compile(as_python(root, other))
    for _ in range(6):
        text = data.draw(st.text(LETTERS, max_size=6))
        ids = tokens()[1].encode(text, add_special_tokens=False).ids
        state = made.deep_copy()
        is_match = state.try_consume_tokens(ids) == len(ids) and state.is_accepting()
        assert bool(is_match) == bool(expected.fullmatch(text)), (lark, text)
