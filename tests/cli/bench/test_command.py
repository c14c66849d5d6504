"""Flags that cannot be used are refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitfire.cli.bench.command import app
from splitfire.core.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rates=fast"], "--rates: is 'fast', accepted: auto, or at most 64 requests a second with commas"),
        (["--slo-ttft=500"], "--slo-ttft: is '500', accepted: a time such as 500ms"),
        (["--rounds=0"], "--rounds: is '0', accepted: a number from 1 to 100"),
        (["--compare=split,unified"], "--compare: is 'split,unified', accepted: one or more of split, aggregated, auto"),
        (["--server=nowhere"], "--server: is 'nowhere', accepted: host:port"),
        (["--server=h:1", "--compare=split"], "--server and --compare: a running fleet is what it is"),
        (["--shared-prefix=256"], "--shared-prefix: is '256', accepted: fewer than --prompt-tokens, which are 256"),
        (["--report=/nowhere/out.html"], "--report: is '/nowhere/out.html', accepted: a file that can be written"),
        (["--trace=/nowhere.jsonl"], "--trace: nowhere.jsonl: No such file"),
        (["--model=/nowhere"], "No such file"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], says: str) -> None:
    ran = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(ran.exception, ConfigError)
    assert says in str(ran.exception)
    assert "\n" not in str(ran.exception)


def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"timestamp": 0}\n')
    ran = CliRunner().invoke(app, ["serve", f"--trace={path}"])
    assert "--trace: some.jsonl, line 1: input_length: null" in str(ran.exception)
