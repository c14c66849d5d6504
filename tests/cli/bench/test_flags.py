"""What flags may say, and what is said of those that may not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from splitfire.cli.bench.flags import (
    Lengths,
    parse_count,
    parse_lengths,
    parse_names,
    parse_rates,
    parse_server,
    parse_time,
)
from splitfire.core.errors import ConfigError


def test_times_have_a_unit() -> None:
    assert [parse_time("--x", text, 0, 600) for text in ("500ms", "1.5s", "2min", "0s")] == [0.5, 1.5, 120, 0]


def test_rates_rise_and_come_once() -> None:
    assert parse_rates("--rates", "4,1, 2,4") == (1, 2, 4)
    assert parse_rates("--rates", "auto") == ()


def test_lengths_are_one_number_or_two() -> None:
    assert (parse_lengths("--x", "256"), parse_lengths("--x", "64-512")) == (Lengths(256, 256), Lengths(64, 512))
    drawn = {Lengths(3, 5).draw(Random(seed)) for seed in range(100)}
    assert drawn == {3, 4, 5}


@pytest.mark.parametrize(
    ("parse", "value", "accepted"),
    [
        *((lambda text: parse_time("--x", text, 0.001, 60), text, "500ms") for text in ("500", "", "-1s", "1 h", "61s", "0ms", "nans", "1e3s")),
        *((lambda text: parse_rates("--x", text), text, "1,2,4,8") for text in ("", "1,", "0", "-1", "1;2", "inf", "10001", "1e3", "Auto")),
        (lambda text: parse_rates("--x", text), ",".join(map(str, range(1, 66))), "at most 64"),
        *((lambda text: parse_lengths("--x", text), text, "64-512") for text in ("", "0", "9-8", "-5", "1-", "1000001", "a", "1.5")),
        *((lambda text: parse_count("--x", text, 1, 9), text, "from 1 to 9") for text in ("", "0", "10", "1.0", "x", "-1", "9" * 30)),
        *((lambda text: parse_names("--x", text, ("a", "b")), text, "a, b") for text in ("", "c", "a,a", "a,,b", "A")),
        *((lambda text: parse_server("--x", text), text, "host:port") for text in ("", "7070", ":7070", "h:", "h:0", "h:65536", "h h:1")),
    ],
)  # fmt: skip
def test_a_bad_flag_gets_one_line_with_its_name_its_value_and_what_is_accepted(
    parse: Callable[[str], object], value: str, accepted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(value)
    text = str(caught.value)
    assert text.startswith(f"--x: is {value!r}, accepted: ")
    assert accepted in text
    assert "\n" not in text
