"""A usage file: what is changed, removed or moved in it is found, and costs are exact."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfire.core.errors import ConfigError
from splitfire.core.usage import BEGINNING, BrokenChain, Price, UsageLine, chained, hash_of_last, read_lines, read_prices

PRICE = Price(prompt=0.5, cached=0.05, generated=2.0, prefill_second=0.001, decode_second=0.0005)


def written(count: int) -> list[str]:
    rows, previous = [], BEGINNING
    for number in range(count):
        line = UsageLine("2026-01-01T00:00:00.000+00:00", "a", "k", "pico", f"r{number}", prompt_tokens=number, generated_tokens=7)
        row, previous = chained(line, previous, PRICE)
        rows.append(row)
    return rows


def test_what_was_written_is_read_and_costs_what_it_says() -> None:
    found = list(read_lines(written(3), "u", previous=BEGINNING))
    assert [one.line.request_id for one in found] == ["r0", "r1", "r2"]
    assert found[2].cost == Decimal("0.000015000") == found[2].line.cost(PRICE)
    assert found[2].currency == "EUR"


def test_cost_is_exact_and_cached_tokens_are_not_charged_twice() -> None:
    line = UsageLine("t", prompt_tokens=1_000_000, cached_tokens=400_000, generated_tokens=100_000, prefill_s=2.5, decode_s=4.0)
    assert line.cost(PRICE) == Decimal("0.3") + Decimal("0.02") + Decimal("0.2") + Decimal("0.0025") + Decimal("0.002")


@given(st.integers(1, 6), st.data())
def test_every_change_is_found(count: int, data: st.DataObject) -> None:
    rows = written(count)
    at = data.draw(st.integers(0, count - 1))
    kind = data.draw(st.sampled_from(["number", "text", "remove", "swap", "repeat", "forge"]))
    row = json.loads(rows[at])
    if kind == "number":
        row["generated_tokens"] += 1
    elif kind == "text":
        row["tenant"] = "b"
    elif (
        kind == "forge"
    ):  # with a hash that fits the line itself: what follows does not fit it, and nor does the note of the last hash
        row, _ = {}, row
        rows[at], _ = chained(UsageLine("t", "b"), json.loads(rows[at])["previous"], None)
    if kind in ("number", "text"):
        rows[at] = json.dumps(row)
    elif kind == "remove":
        del rows[at]
    elif kind == "swap":
        rows[at], rows[0] = rows[0], rows[at]
    elif kind == "repeat":
        rows.insert(at, rows[at])
    last = json.loads(written(count)[-1])["hash"]
    is_same = rows == written(count)
    try:
        hashes = [one.hash for one in read_lines(rows, "u", previous=BEGINNING)]
        is_whole = bool(hashes) and hashes[-1] == last
    except BrokenChain:
        is_whole = False
    assert is_whole == is_same


@pytest.mark.parametrize("row", ["", "[]", "{}", "nonsense", '{"hash": 1}', "null"])
def test_what_is_no_line_is_named(row: str) -> None:
    with pytest.raises(BrokenChain, match=r"u, line 2: is not a line"):
        list(read_lines([*written(1), row], "u"))


def test_the_last_whole_line_is_found_behind_one_that_was_cut() -> None:
    rows = written(3)
    text = "".join(rows).encode()
    file = io.BytesIO(text + b'{"at":"2026')
    assert hash_of_last(file) == (json.loads(rows[-1])["hash"], len(text))
    assert hash_of_last(io.BytesIO(b"")) == (BEGINNING, 0)
    assert hash_of_last(io.BytesIO(b'{"at"')) == (BEGINNING, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt = 1", r"accepted: tables"),
        ("[model.a]\npromt = 1", r"model\.a\.promt: Extra"),
        ("[model.a]\nprompt = -1", r"model\.a\.prompt: .*greater"),
        ("[model.a]\nprompt = nan", r"model\.a\.prompt"),
        ("[model.a]\ncurrency = 'euro'", r"model\.a\.currency"),
        ("[[[", r"is not TOML"),
    ],
)
def test_a_bad_price_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_prices(path)


def test_a_last_line_that_was_cut_off_is_nobodys_fault_but_only_there() -> None:
    row, _ = chained(UsageLine("now", tenant="a"), BEGINNING, None)
    assert len(list(read_lines([row, row[:40]], "u", may_be_cut=True))) == 1
    for last, may_be_cut in ((row[:40] + "\n", True), (row[:40], False), ("\udcff\n", True)):
        with pytest.raises(BrokenChain, match="is not a line of usage"):
            list(read_lines([row, last], "u", may_be_cut=may_be_cut))
