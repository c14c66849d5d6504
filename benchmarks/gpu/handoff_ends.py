"""The two processes of a hand-off, seen from the one that measures; and which way UCX says that it took. Neither outlives this one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from benchmarks.orders import Orders
from splitfire.core.flags import PARENT_VARIABLE
from splitfire.core.layout import KvLayout

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0  # torch, a CUDA context, UCX
ORDER_S = 60.0  # no single order takes as long
LOG_LINES = 60
# A table of UCX_PROTO_INFO: a row that names an operation and the memory it is about, then one for each range of sizes.
_TITLE = re.compile(r"\| *\S.* cfg#\d+ +\| (.+?) *\|")
_LARGEST = re.compile(r"\| +(?:\d+ +)?\d+\S*\.\.inf \| (.+?) *\| (.+?) *\|")


@dataclass(frozen=True, slots=True)
class Setup:
    """What both ends are told before anything else."""

    device: str  # as --device has it
    layout: KvLayout  # of the sender's pool
    num_tokens: int
    chunk_tokens: int
    slot_size: int  # as --slot-size has it; a worker's slots hold at least a block of any dtype

    @property
    def num_blocks(self) -> int:
        return self.layout.blocks_for(self.num_tokens)


class End(Orders):
    """One of the two. What it and UCX print goes to `log`."""

    def __init__(self, role: str, setup: Setup, directory: Path) -> None:
        self.log = directory / f"{role}.log"
        mine, theirs = Pipe()
        super().__init__(f"the {role} end", mine, ORDER_S)
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "UCX_PROTO_INFO": "y", "UCX_LOG_FILE": "stderr"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.handoff_node", str(theirs.fileno())],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        theirs.close()
        mine.send((role, setup))

    def result(self, within_s: float | None = None) -> Any:
        try:
            return super().result(within_s)
        except (EOFError, ConnectionResetError) as exc:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{self._name} died; it said: {''.join(last)}") from exc

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.close()


@contextlib.contextmanager
def two_ends(setup: Setup) -> Iterator[tuple[End, End]]:
    """Prefill's and decode's, introduced to each other."""
    ends: list[End] = []
    with tempfile.TemporaryDirectory(prefix="handoff-") as directory:
        try:
            for role in ("prefill", "decode"):
                ends.append(End(role, setup, Path(directory)))
            for end in ends:
                end.result(START_S)
            cards = [end.do("card") for end in ends]
            for end, other in zip(ends, reversed(cards), strict=True):
                end.do("meet", other)
            yield ends[0], ends[1]
        except BaseException:
            print_logs(ends)
            raise
        finally:
            for end in ends:
                end.kill()


def print_logs(ends: Sequence[End]) -> None:
    """What they said last: their logs go with them."""
    for end in ends:
        print(end.log.name, *end.log.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n", file=sys.stderr)


def lanes_of_gpu_memory(log: str) -> list[str]:
    """What carries the largest messages from or to GPU memory, by UCX's own tables: `cuda_ipc/cuda`, `tcp/lo`, ... A rendezvous says what
    it did, and counts before what a send was planned to do."""
    planned: set[str] = set()
    done: set[str] = set()
    title = ""
    for line in log.splitlines():
        if match := _TITLE.search(line):
            title = match[1]
        elif (match := _LARGEST.search(line)) and "cuda" in title:
            if title.startswith("rendezvous data"):
                done.add(match[2])
            elif title.startswith("tagged message"):
                planned.add(match[2])
    return sorted(done or planned)
