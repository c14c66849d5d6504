"""Who takes part in a comparison: servers that stay up for all of it and are measured in turn, A, B, A, B.

While it is not its turn an opponent's processes are stopped, so that what they do when idle is taken from nobody. Ours are
left alone: their streams to the router would be counted as lost. Threads of this process, which are the client, run on the
cores that the contestant names, and so does the router of a fleet of ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.opponents.server import Server, ServerFailed, ServerPlan
from benchmarks.report import Row
from benchmarks.serve.comparisons import Series
from benchmarks.serve.endpoints import Endpoint, GrpcEndpoint, HttpEndpoint
from benchmarks.serve.fleets import Cores, fleet

OURS = "Splitfire"
KV_MEMORY = "--kv-memory=1GiB"  # as much as opponents get
Taken = TypeVar("Taken")


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server that runs. `name` says with which settings and on which cores."""

    name: str
    family: str  # what targets speak of: "vLLM", "OpenVINO GenAI", or OURS
    endpoint: Endpoint
    client_cpus: tuple[int, ...]
    server: Server | None = None  # None: ours

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        pin_this_process(self.client_cpus)
        if self.server is not None:
            self.server.resume()
        try:
            yield
        finally:
            if self.server is not None:
                self.server.pause()


class Lineup:
    """The contestants of one comparison. Use as a context manager: it ends what it started."""

    def __init__(self, model: str, against: Sequence[str]) -> None:
        self.model = model
        self._against = against
        self.contestants: list[Contestant] = []
        self.skipped: list[Row] = []
        self.versions: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Lineup:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        pin_this_process(tuple(range(os.cpu_count() or 1)))

    def wants(self, opponent: str) -> bool:
        """Whether somebody asked for a comparison with it (--against)."""
        return opponent in self._against

    def ours(self, name: str, cores: Cores, flags: Sequence[str], client_cpus: Sequence[int], family: str = OURS) -> None:
        pin_this_process(client_cpus)
        has_memory = any(flag.startswith("--kv-memory") for flag in flags)
        running = self._stack.enter_context(fleet(self.model, cores, flags if has_memory else [KV_MEMORY, *flags]))
        self._add(Contestant(f"{name}, {cores}", family, GrpcEndpoint(running.address), tuple(client_cpus)))

    def theirs(
        self, family: str, reason: str, plan: Callable[[Path], ServerPlan], versions: Callable[[], Mapping[str, str]],
        client_cpus: Sequence[int],
    ) -> None:  # fmt: skip
        """`reason`: why it cannot take part, else empty. What does not start becomes a row that says so."""
        if not reason:
            pin_this_process(client_cpus)
            try:
                server = self._stack.enter_context(Server(plan(Path(self.model).resolve())))
            except ServerFailed as exc:
                reason = str(exc)
        if reason:
            self._skip(family, reason)
            return
        server.pause()
        self.versions |= versions()
        endpoint = HttpEndpoint(server.plan.port, server.plan.model)
        self._add(Contestant(server.plan.name, family, endpoint, tuple(client_cpus), server))

    def measure(self, turns: int, warmup: int, take: Callable[[Contestant, int], Taken]) -> dict[str, list[Taken]]:
        """Each contestant's measurements by its name; `take` gets the contestant and the turn's number, for seeds. An opponent that fails
        takes no further part, and a row says so; when ours fails the comparison ends."""
        taken: dict[str, list[Taken]] = {c.name: [] for c in self.contestants}
        for turn in range(warmup + turns):
            for contestant in tuple(self.contestants):
                try:
                    with contestant.turn():
                        found = take(contestant, turn)
                except Exception as exc:
                    if contestant.server is None:
                        raise
                    self.contestants.remove(contestant)
                    del taken[contestant.name]
                    self._skip(contestant.name, f"{type(exc).__name__}: {exc}")
                    continue
                if turn >= warmup:
                    taken[contestant.name].append(found)
        return taken

    def series(self, taken: Mapping[str, Sequence[Taken]], read: Callable[[Taken], float]) -> list[Series]:
        """One number of each measurement, in the order of the contestants."""
        return [Series(c.name, c.family, tuple(read(t) for t in taken[c.name])) for c in self.contestants if c.name in taken]

    def _skip(self, whom: str, reason: str) -> None:
        print(f"skipped: {whom}: {reason}")
        self.skipped.append(Row(f"against {whom}", f"skipped: {reason}", "", 0.0, None, whom, None, "", None, 0.0))

    def _add(self, contestant: Contestant) -> None:
        assert contestant.name not in {c.name for c in self.contestants}, contestant.name
        self.contestants.append(contestant)


def pin_this_process(cpus: Sequence[int]) -> None:
    """All its threads; those to come inherit from the one that starts them."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cpus)
