"""What the README and the tutorial tell people to type, typed: every command of their shell blocks, in order, in a real shell, and what
they say will be seen.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from splitfire.cli.supervisor import free_port
from tests.checkpoints import PICO, ROOT

BLOCK = re.compile(r"```(sh|text|python)\n(.*?)```", re.DOTALL)
NOT_HERE = {
    "scripts/demo": "sets up a clone; CI's own first step, and tests/e2e/test_cli.py runs what it starts",
    "scripts/test": "runs this",
    "source": "the environment is this one",
    "grpcurl": "is not installed; tests/e2e/test_generate.py asks by reflection",
    "splitfire chat": "wants somebody who types; tests/e2e/test_cli.py does",
    "splitfire advise": "measures for minutes; tests/cli/test_advise.py",
    "docker": "make test-compose",
}
READY_S = 120.0


class Terminal:
    """A shell in a folder of its own, with ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.grpc, self.http = free_port(), free_port()
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, command in (("splitfire", f"{sys.executable} -m splitfire.cli"), ("python", sys.executable)):
            (bin_folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (bin_folder / name).chmod(0o755)
        (folder / "my-llama").symlink_to(PICO)
        self.environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SPLITFIRE_PORT": str(self.grpc),
            "SPLITFIRE_HTTP_PORT": str(self.http),
            "SPLITFIRE_SERVER": f"127.0.0.1:{self.grpc}",
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        self.said = ""
        self._fleet: subprocess.Popen[str] | None = None

    def here(self, text: str) -> str:
        """The same, in this folder, at these ports, among these processes; on a machine of two processors workers share them."""
        text = re.sub(r" --(prefill|decode)-cpus \S+", "", text)
        for name, port in (("7070", self.grpc), ("8000", self.http)):
            text = text.replace(f"127.0.0.1:{name}", f"127.0.0.1:{port}")
        mine = self._fleet.pid if self._fleet is not None else 0
        return text.replace("/tmp/", f"{self.folder}/").replace("pgrep -f", f"pgrep -P {mine} -f")

    def run(self, block: str) -> None:
        """A shell block. A fleet that it starts stays up until the next one, or the end."""
        self.said = ""
        lines = [line for line in block.splitlines() if not any(line.startswith(name) for name in NOT_HERE)]
        rest: list[str] = []
        for line in lines:
            if re.match(r"(\S+=\S+ )*splitfire up", line):
                self._sh("\n".join(rest))
                rest = []
                self.up(line)
            else:
                rest.append(line)
        self._sh("\n".join(rest))

    def up(self, line: str) -> None:
        """In the background, until it is ready."""
        self.down()
        log = self.folder / "up.log"
        with log.open("w") as file:
            command = f"exec env {self.here(line)}"
            self._fleet = subprocess.Popen(
                ["bash", "-c", command], cwd=self.folder, env=self.environment, stdout=file, stderr=file, text=True
            )
        deadline = time.monotonic() + READY_S
        while "Ctrl-C ends it" not in log.read_text():
            assert self._fleet.poll() is None, f"{line}:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{line}:\n{log.read_text()}"
            time.sleep(0.05)

    def down(self) -> None:
        """Ctrl-C."""
        if self._fleet is not None:
            self._fleet.send_signal(signal.SIGINT)
            try:
                code = self._fleet.wait(30)
            except subprocess.TimeoutExpired:
                pytest.fail(self._what_blocks(psutil.Process(self._fleet.pid)))
            assert code in (0, 130, -2)
            self._fleet = None

    def _what_blocks(self, fleet: psutil.Process) -> str:
        """What every thread of every process of the fleet does, and what they logged."""
        for process in (*fleet.children(), fleet):  # faulthandler answers, PYTHONFAULTHANDLER is set
            process.send_signal(signal.SIGABRT)
        psutil.wait_procs([fleet], 10)
        said = (self.folder / "up.log").read_text()
        logs = sorted(Path(re.findall(r"logs: (\S+);", said)[-1]).glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in (self.folder / "up.log", *logs))

    def _sh(self, script: str) -> None:
        if not script.strip():
            return
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(script)],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert ran.returncode == 0, f"{script}\n{ran.stdout}\n{ran.stderr}"
        self.said += ran.stdout + ran.stderr

    def expect(self, block: str) -> None:
        """Each line is in what was said, in this order; an ellipsis stands for anything."""
        at = 0
        for line in filter(None, block.splitlines()):
            pattern = ".*?".join(map(re.escape, line.split("…")))
            found = re.compile(pattern).search(self.said, at)
            assert found is not None, f"{line!r} is not in\n{self.said[at:]}"
            at = found.start()


@contextmanager
def terminal(folder: Path) -> Iterator[Terminal]:
    made = Terminal(folder)
    try:
        yield made
        made.down()
    finally:
        if made._fleet is not None:
            made._fleet.kill()
            made._fleet.wait(30)


@pytest.mark.timeout(400)
def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    with terminal(tmp_path) as shell:
        for kind, block in BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text()):
            if kind == "sh":
                shell.run(block)
            else:
                shell.expect(block)
        answers = (tmp_path / "answer.txt").read_text()
        assert len(answers) > 200, "the answer outlived its worker"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("which", [slice(1, 2), pytest.param(slice(2, None), marks=pytest.mark.long)], ids=["first", "others"])
def test_the_readmes_commands_work(tmp_path: Path, which: slice) -> None:
    """But for the two that set everything up."""
    blocks = [block for kind, block in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "sh"]
    with terminal(tmp_path) as shell:
        shell.run(
            'umask 077; splitfire key > key.txt\nprintf "[tenant.a]\\n%s\\nadmin = true\\n" "$(grep -o \'keys = .*\' key.txt)" > keys.toml'
        )
        for block in blocks[which]:
            shell.run(block)


def test_the_readmes_python_works(tmp_path: Path) -> None:
    [program] = [block for kind, block in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "python"]
    with terminal(tmp_path) as shell:
        shell.up("splitfire up pico")
        (tmp_path / "program.py").write_text(shell.here(program))
        shell.run("python program.py")
        assert shell.said.strip()


@pytest.mark.parametrize("page", ["troubleshooting.md"])
def test_reasons_in_the_pages_are_ones_that_are_given(page: str) -> None:
    """What is keyed by exact words must have them."""
    sources = "".join(
        path.read_text() for folder in ("router", "splitfire", "kvtransfer") for path in (ROOT / folder).rglob("*.py")
    )
    named = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", (ROOT / "docs" / page).read_text())
    missing = {name for name in named if name not in sources}
    assert not missing
