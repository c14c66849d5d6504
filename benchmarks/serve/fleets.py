"""Fleets of ours on this machine, for as long as a comparison takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitfire.cli.supervisor import Fleet, FleetPlan, free_port
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model

SPLIT, AGGREGATED = "split", "aggregated"
MAX_QUEUED = "--max-queued-s=600"  # others let a request wait for as long as its client does


@dataclass(frozen=True, slots=True)
class Cores:
    """Which processors the workers get. No prefill cores: no prefill worker."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    @property
    def everybody(self) -> tuple[int, ...]:
        return (*self.prefill, *self.decode)

    def __str__(self) -> str:
        decode = ",".join(map(str, self.decode))
        return f"cores {','.join(map(str, self.prefill))} + {decode}" if self.prefill else f"cores {decode}"


@contextlib.contextmanager
def fleet(model: str, cores: Cores, flags: Sequence[str]) -> Iterator[Fleet]:
    """Router and workers, ready. Each worker pins itself to its cores; the router runs where this process may."""
    is_split = bool(cores.prefill)
    plan = FleetPlan(
        model, Path(model).name, int(is_split), 1, cores.prefill, cores.decode, free_port(),
        router_flags=("--split=always" if is_split else "--split=never", MAX_QUEUED), worker_flags=tuple(flags),
    )  # fmt: skip
    started = Fleet(plan, print)
    try:
        started.start()
        started.wait_ready()
        yield started
    finally:
        started.stop()


def cores_of(kind: str, cpus: Sequence[int]) -> Cores:
    """Split: prefill on the first core, decode on the second. Aggregated: one worker, on the second core alone."""
    return Cores(tuple(cpus[:1]) if kind == SPLIT else (), tuple(cpus[1:2]))


def vocab_size(model: str) -> int:
    return ModelDir(resolve_model(model)).config.vocab_size
