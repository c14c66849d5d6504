"""A prefill and a decode end as two processes, for as long as it takes to measure what is between them.

They are `python -m splitfire.worker.doctor`; one JSON object a line each way. They end when their input does.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from splitfire.cli.findings import DigestCost, Member, PairReading
from splitfire.cli.supervisor import default_cpus
from splitfire.core.flags import PARENT_VARIABLE
from splitfire.core.machine import MachineFacts, Namespaces, SharedMemory

START_S = 60.0  # torch from a cold disk
ANSWER_S = 15.0
STOP_S = 5.0
MEASUREMENTS = 7  # the fastest counts: the others were interrupted


class EndError(Exception):
    """An end did not start, or did not answer; one line for a person."""


class EndProcess:
    """One end. `ask` blocks until it has answered."""

    def __init__(self, role: str, flags: tuple[str, ...]) -> None:
        self.role = role
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "splitfire.worker.doctor", f"--role={role}", *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        )  # fmt: skip

    def read(self, timeout_s: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout_s)[0]:
            raise EndError(f"the {self.role} end said nothing for {timeout_s:g} s{self._last_words()}")
        line = out.readline()
        if not line:
            self._process.wait(STOP_S)
            raise EndError(f"the {self.role} end ended with code {self._process.returncode}{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EndError(f"the {self.role} end: {answer['error']}")
        return answer

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says why
        return self.read(ANSWER_S)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1].removeprefix('splitfire: ')[:300]}" if lines else ""


class LocalPair:
    """Two ends that have met. `members` are known from the start, so that there is something to judge when they cannot meet."""

    def __init__(self, prefill: EndProcess, decode: EndProcess) -> None:
        self._prefill, self._decode = prefill, decode
        self._hellos = {end.role: end.read(START_S) for end in (prefill, decode)}
        self.members = tuple(Member(role, role, facts_from_json(hello["facts"])) for role, hello in self._hellos.items())

    def measure(self) -> PairReading:
        """The fastest of several, and memcpy beside it."""
        for end, other in ((self._decode, "prefill"), (self._prefill, "decode")):  # who measures is introduced last
            hello = self._hellos[other]
            end.ask({"do": "meet", "name": other, "incarnation": hello["incarnation"], "address": hello["address"]})
        copied, runs = 0.0, []
        for _ in range(MEASUREMENTS):
            copied = max(copied, self._prefill.ask({"do": "copy"})["bytes_per_s"])
            runs.append(self._prefill.ask({"do": "measure"}))
        best = max(runs, key=lambda run: float(run["bytes_per_s"]))
        prefill, decode = (member.facts for member in self.members)
        return PairReading(
            "prefill", "decode", prefill.transport, memcpy_bytes_per_s=copied,
            is_same_machine=prefill.machine_id == decode.machine_id, **best,
        )  # fmt: skip

    def digest_cost(self) -> DigestCost:
        return DigestCost(**self._prefill.ask({"do": "digest"}))


@contextmanager
def local_pair(transport: str | None) -> Iterator[LocalPair]:
    """EndError when an end cannot start. Nothing is left afterwards."""
    ends: list[EndProcess] = []
    try:
        for role, cpus in zip(("prefill", "decode"), default_cpus(1, 1), strict=True):
            flags = [f"--transport={transport}"] if transport else []
            flags += [f"--cpus={','.join(map(str, cpus))}"] if cpus else []
            ends.append(EndProcess(role, tuple(flags)))
        yield LocalPair(*ends)
    finally:
        for end in ends:
            end.close()


def facts_from_json(facts: Mapping[str, Any]) -> MachineFacts:
    """What `dataclasses.asdict` made of it."""
    nested = {
        "shm": SharedMemory(**facts["shm"]),
        "namespaces": Namespaces(**facts["namespaces"]),
        "ucx_settings": tuple(facts["ucx_settings"]),
    }
    return MachineFacts(**{**facts, **nested})
