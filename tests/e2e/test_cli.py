"""The command line as a newcomer meets it: answers, clear errors, exit codes, the demo."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from splitfire.cli.__main__ import app
from tests.checkpoints import ROOT
from tests.e2e.fleets import RunningFleet

DEMO_S = 15.0


def splitfire(*arguments: str, stdin: str | None = None, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitfire.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, input=stdin, cwd=ROOT)


def test_generate_streams_text_and_shows_the_waterfall(pico: RunningFleet) -> None:
    ran = splitfire("generate", "def f(", "--server", pico.address, "--max-tokens=200", "--temperature=0", "--trace")
    assert ran.returncode == 0
    assert ran.stdout.strip()
    for phase in ("to token 1", "accept", "prefill", "stream", "all that follow", "forward"):
        assert phase in ran.stderr
    again = splitfire("generate", "-", "--server", pico.address, "--max-tokens=200", "--temperature=0", stdin="def f(")
    assert again.stdout == ran.stdout


def test_generate_takes_a_predicted_output_from_a_file(pico: RunningFleet, tmp_path: Path) -> None:
    plain = splitfire("generate", "def f(", "--server", pico.address, "--max-tokens=40", "--temperature=0")
    file = tmp_path / "predicted.txt"
    file.write_text(plain.stdout)
    for _ in range(10):  # steps with drafts that took longer than without are followed by some without
        ran = splitfire(
            "generate", "def f(", "--server", pico.address, "--max-tokens=40", "--temperature=0", "--trace", f"--predicted={file}"
        )
        assert (ran.returncode, ran.stdout) == (0, plain.stdout)
        if "accepted" in ran.stderr:
            return
    raise AssertionError(ran.stderr)


def test_chat_keeps_the_conversation(pico: RunningFleet) -> None:
    ran = splitfire("chat", "--server", pico.address, "--max-tokens=1", stdin="hello\nagain\n\n")
    assert ran.returncode == 0
    assert ran.stdout.count("> ") == 3


def test_fleet_shows_workers_and_pairs(pico: RunningFleet) -> None:
    ran = splitfire("fleet", "--server", pico.address)
    assert ran.returncode == 0
    assert "prefill-0" in ran.stdout
    assert "ucx over shared memory" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "x", "--server", "127.0.0.1:9"], 1, "start a fleet with `splitfire up`"),
        (["generate", "x", "--max-tokens=0"], 2, "max-tokens"),
        (["generate", "x", "--no-such-flag"], 2, "No such option"),
        (["generate", "x", "--predicted=/nowhere"], 2, "--predicted /nowhere: No such file"),
        (["frobnicate"], 2, "No such command"),
        (["up", "/nowhere", "--port=0", "--http-port=0"], 2, "No such file"),
        (["up", "pico", "--port=0", "--http-port=0", "--prefill-cpus=a"], 2, "processor numbers"),
        (["up", "pico", "--port=0", "--http-port=0", "--split=sometimes"], 2, "split"),
        (["router", "--blok=1"], 2, "unknown flag --blok"),
        (["prefill", "--block-size=33"], 2, "power of two"),
        (["decode", "--kv-memory=lots"], 2, "KiB, MiB or GiB"),
        (["decode", "--speculate=model"], 2, "--draft-model"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], code: int, says: str) -> None:
    ran = splitfire(*arguments)
    assert ran.returncode == code, ran.stderr
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_refused_request_is_one_line(pico: RunningFleet) -> None:
    ran = splitfire("generate", "x", "--server", pico.address, "--temperature=-1")
    assert ran.returncode == 1
    assert (
        ran.stderr.strip() == "splitfire: sampling.temperature: is -1.0, accepted: 0 to 100 (INVALID_ARGUMENT, invalid_temperature)"
    )


def has_a_tester(process: psutil.Process) -> bool:
    """It, or an ancestor, is of a test run beside this one. What the demo left behind would have lost its parents."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("pytest" in " ".join(parent.cmdline()) for parent in process.parents())
    return True  # it has ended by now


def test_the_demo_does_the_main_job_and_leaves_nothing_running() -> None:
    before = {p.pid for p in psutil.process_iter()}
    took_s: list[float] = []
    while not took_s or (took_s[-1] > DEMO_S and len(took_s) < 3):  # its processors are other tests' too
        began = time.monotonic()
        ran = splitfire("demo", "--max-tokens=32")
        took_s.append(time.monotonic() - began)
        assert ran.returncode == 0, ran.stderr
    assert min(took_s) < DEMO_S
    assert "ucx over shared memory" in ran.stdout
    assert "KV: " in ran.stdout
    fresh = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    ours = [
        p for p in fresh if "splitfire" in (line := " ".join(p.info["cmdline"] or ())) and sys.prefix in line
    ]  # not another clone's
    left = [p for p in ours if not has_a_tester(p)]
    assert not left


def test_every_command_explains_itself() -> None:
    """Services are processes of their own; the others are asked here, all there are."""
    services = {"router", "prefill", "decode", "simulate"}
    for command in services:
        ran = splitfire(command, "--help")
        assert (ran.returncode, "--" in ran.stdout) == (0, True), command
    others = {name for made in app.registered_commands if (name := made.name or getattr(made.callback, "__name__", ""))}
    assert {"up", "generate", "chat", "batch", "fleet", "doctor", "demo"} <= others
    for command in others - services:
        asked = CliRunner().invoke(app, [command, "--help"])
        assert (asked.exit_code, "--" in asked.stdout) == (0, True), command
