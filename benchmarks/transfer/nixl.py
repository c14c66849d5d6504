"""NIXL's two processes, seen from here: started in their own environment, stopped (SIGSTOP) whenever it is not their turn.

An idle NIXL agent with its progress thread uses a core, which would be taken from whoever is measured.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.transfer.cases import SHAPES, Shape
from benchmarks.transfer.node import SEEDS

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "nixl-venv" / "bin" / "python"
SLOW_S = 60.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to set NIXL up and to move bytes with it."""

    name: str
    error_handling: str
    has_progress_thread: bool


DEFAULT = Setting("NIXL default", "peer", True)
TUNED = Setting("NIXL tuned", "none", False)  # no error handling: shared memory; no thread: the caller's own polling is enough
SETTINGS = (DEFAULT, TUNED)


def why_not() -> str:
    """Why NIXL cannot be measured here; empty when it can."""
    if not PYTHON.exists():
        return "not installed: make bench-opponents"
    found = subprocess.run([PYTHON, "-c", "import nixl_cu12._api"], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 else f"does not load: {found.stderr.strip().splitlines()[-1]}"


def version() -> str:
    code = "from importlib.metadata import version; print(version('nixl-cu12'))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


class NixlEnd:
    """One process."""

    def __init__(self, name: str, core: int, setting: Setting) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        command: list[str | Path] = [PYTHON, Path(__file__).with_name("nixl_end.py"), name, str(core), setting.error_handling]
        self.process = subprocess.Popen(
            [*command, str(int(setting.has_progress_thread))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )  # fmt: skip

    def do(self, *order: Any) -> Any:
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None and pipe_out is not None
        pipe_in.write(json.dumps(order).encode() + b"\n")
        pipe_in.flush()
        ready, _, _ = select.select([pipe_out], [], [], SLOW_S)
        line = pipe_out.readline() if ready else b""
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.name} {order[0]}: {self._errors.read()[-500:] or 'no answer'}")
        return json.loads(line)


class NixlPair:
    """Both ends with one setting."""

    def __init__(self, setting: Setting, ends: Sequence[NixlEnd]) -> None:
        self.setting = setting
        self._ends = dict(zip(SEEDS, ends, strict=True))

    def introduce(self) -> None:
        for role, end in self._ends.items():
            for shape in SHAPES.values():
                end.do("add", shape.name, shape.layout.block_bytes, shape.num_pieces, role == "sending")
        cards = {role: end.do("card") for role, end in self._ends.items()}
        self._ends["sending"].do("meet", cards["receiving"])
        self._ends["receiving"].do("meet", cards["sending"])

    def make(self, operation: str, shape: Shape) -> float:
        here, there = self._sides(operation)
        return float(self._ends[here].do("make", operation, shape.name, shape.ids(SEEDS[here]), shape.ids(SEEDS[there])))

    def move(self, operation: str, shape: Shape) -> float:
        return float(self._ends[self._sides(operation)[0]].do("move", operation, shape.name))

    def forget(self, shape: Shape) -> None:
        self._ends["receiving"].do("forget", shape.name)

    def is_right(self, shape: Shape) -> bool:
        sums = [end.do("sums", shape.name, shape.ids(SEEDS[role])) for role, end in self._ends.items()]
        return bool(sums[0] == sums[1])

    @contextlib.contextmanager
    def turn(self) -> Iterator[NixlPair]:
        """Lets the two run for a while."""
        for end in self._ends.values():
            end.process.send_signal(signal.SIGCONT)
        try:
            yield self
        finally:
            for end in self._ends.values():
                end.process.send_signal(signal.SIGSTOP)

    @staticmethod
    def _sides(operation: str) -> tuple[str, str]:
        """Who initiates, and the other."""
        return ("receiving", "sending") if operation == "READ" else ("sending", "receiving")


@contextlib.contextmanager
def nixl_pair(setting: Setting, cores: Sequence[int]) -> Iterator[NixlPair]:
    ends: list[NixlEnd] = []
    try:
        for role, core in zip(SEEDS, cores, strict=True):
            ends.append(NixlEnd(role, core, setting))
        pair = NixlPair(setting, ends)
        with pair.turn():
            pair.introduce()
        yield pair
    finally:
        for end in ends:
            end.process.kill()
            end.process.wait()
