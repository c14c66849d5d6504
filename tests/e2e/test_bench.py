"""`splitfire bench serve` as a person runs it: against a fleet, with fleets of its own, cut short, and with wrong flags."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from splitfire.core.flags import PARENT_VARIABLE
from tests.checkpoints import ROOT
from tests.e2e.fleets import RunningFleet
from tests.e2e.test_cli import splitfire

SMALL = ("--prompt-tokens=64", "--output-tokens=8-16", "--warmup=200ms")


def test_a_running_fleet_is_loaded_and_reported(pico: RunningFleet, tmp_path: Path) -> None:
    page, numbers = tmp_path / "out.html", tmp_path / "out.json"
    ran = splitfire(
        "bench", "serve", "--server", pico.address, "--rates=4,16", "--duration=1s", "--slo-ttft=10s", "--slo-itl=1s", "--note=<a test>",
        *SMALL, f"--report={page}", f"--json={numbers}",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    read = json.loads(numbers.read_text())
    assert [(row["rate"], row["num_requests"], row["num_met"]) for row in read["rows"]] == [(4, 4, 4), (16, 16, 16)]
    for row in read["rows"]:
        assert 0 < row["ttft"]["p50"] < 10
        assert row["itl"]["count"] == sum(run["tokens"] - 1 for run in read["runs"][row["rate"] == 16]["requests"])
    assert read["workers, " + pico.address] == "1 prefill and 1 decode workers on 1 machine"
    assert read["model"] == "pico"
    assert {"command", "machine of the client", "versions", "time", "load"} <= read.keys()
    html = page.read_text()
    assert "&lt;a test&gt;" in html
    assert pico.address in ran.stdout
    assert "16.0/s" in ran.stdout


@pytest.mark.long
def test_split_and_aggregated_are_compared_and_nothing_stays_behind(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    arguments = ("--rates=16", "--duration=1s", "--rounds=1", *SMALL, f"--report={page}")
    command = [sys.executable, "-m", "splitfire.cli", "bench", "serve", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("split ", "aggregated "))}
    assert {name: line[1:4] for name, line in lines.items()} == {"split": ["16", "16", "0"], "aggregated": ["16", "16", "0"]}
    assert "Split" in out
    html = page.read_text()
    assert "1 prefill and 1 decode workers" in html and "2 decode workers" in html
    assert not children_of(process.pid)


def children_of(pid: int) -> list[psutil.Process]:
    """What a supervisor started says so in its environment, also when it has lost its parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(PARENT_VARIABLE) == str(pid):
                found.append(process)
    return found


def test_ctrl_c_gives_a_report_of_what_there_is(pico: RunningFleet, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    command = [
        sys.executable, "-m", "splitfire.cli", "bench", "serve", "--server", pico.address, "--rates=8,9", "--duration=1s", *SMALL,
        f"--report={page}", "--rounds=50",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "in time" not in process.stderr.readline():  # the first run is over
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "The run was ended before it was complete" in page.read_text()
    assert pico.address in out
    assert "Traceback" not in err


def test_a_mistake_is_told_in_a_line() -> None:
    ran = splitfire("bench", "serve", "--slo-ttft=500")
    assert ran.returncode == 2
    assert ran.stderr == "splitfire: --slo-ttft: is '500', accepted: a time such as 500ms, 30s or 2min, from 1ms to 3600s\n"


def test_nobody_there_is_told_in_a_line() -> None:
    ran = splitfire("bench", "serve", "--server=127.0.0.1:9")
    assert ran.returncode == 1
    assert "nobody answers on 127.0.0.1:9" in ran.stderr
