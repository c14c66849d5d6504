"""A case as the command line names it, and its runs under one policy. Pure but for reading a trace."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from router.policies import PolicyName
from router.simulation import w8, workloads
from router.simulation.engine import Engine
from router.simulation.fleet import Setup, SimulatedFleet
from router.simulation.profile import Profile
from router.simulation.result import Result, mean_of, result_of
from splitfire.core.errors import ConfigError
from splitfire.core.workload_trace import Trace, read_mooncake

ORACLE, POOLED = "oracle", "pooled"
QUEUED = "round_robin_queued"  # requests wait in the router for whoever is free, as with cost; the others' queue at workers
POLICIES = ("cost", "round_robin", "least_loaded", "power_of_two", "random", QUEUED, ORACLE, POOLED)


@dataclass(frozen=True, slots=True)
class Case:
    """What to serve, and by whom."""

    workload: str
    num_workers: int | None = None
    num_prefill: int = 0
    load: float | None = None
    speed: float = 1.0
    cache: float = 0.3
    blocks: int | None = None
    num_requests: int | None = None
    num_seeds: int = 1
    profile: Profile | None = None

    @property
    def workers(self) -> int:
        return self.num_workers or (4 if self.workload == "w8" else 8)


def run(case: Case, policy: str) -> Result:
    """ConfigError when there is no such workload or policy. `oracle`: one cache for all workers; `pooled`: one worker, as fast as all."""
    if policy not in POLICIES:
        raise ConfigError(f"--policy: {policy!r}, expected one of {', '.join(POLICIES)}")
    if not 0 <= case.num_prefill < case.workers:
        raise ConfigError(f"--prefill: {case.num_prefill} of {case.workers} workers: at least one has to decode")
    results = []
    for seed in range(case.num_seeds):
        trace = make_trace(case, seed)
        engine = make_engine(case, trace)
        if case.load is not None:
            trace = workloads.at_load(trace, engine, case.num_prefill or case.workers, case.load)
        fleet = SimulatedFleet(trace.at_rate(case.speed) if case.load is None else trace, make_setup(case, engine, policy, seed))
        fleet.run()
        results.append(result_of(fleet))
    return mean_of(results)


def make_trace(case: Case, seed: int) -> Trace:
    if case.workload == "w8":
        return w8.w8(seed)
    for chat in (workloads.CONVERSATION, workloads.TOOLAGENT):
        if case.workload == chat.name:
            return workloads.generate(chat, seed, case.num_requests or chat.num_requests)
    path = Path(case.workload)
    if not path.exists():
        raise ConfigError(f"{case.workload!r}: neither w8, conversation, toolagent nor a file")
    return read_mooncake(path)


def make_engine(case: Case, trace: Trace) -> Engine:
    if case.profile is not None:
        engine = case.profile.engine()
        return replace(engine, block_size=trace.block_size, num_blocks=engine.num_blocks * engine.block_size // trace.block_size)
    if case.workload == "w8":
        return w8.engine(case.blocks or w8.CACHE_BLOCKS)
    return workloads.large_engine(case.blocks or max(1, int(trace.num_blocks * case.cache / (case.num_prefill or case.workers))))


def make_setup(case: Case, engine: Engine, policy: str, seed: int) -> Setup:
    num_decode = case.workers - case.num_prefill
    if policy == POOLED:
        shares = (case.num_prefill or 1, num_decode)
        return Setup(engine.times(max(shares)), min(1, case.num_prefill), 1, seed=seed)
    if policy in ("cost", ORACLE):
        return Setup(engine, case.num_prefill, num_decode, is_shared=policy == ORACLE, seed=seed)
    name = cast(PolicyName, "round_robin" if policy == QUEUED else policy)
    return Setup(engine, case.num_prefill, num_decode, policy=name, is_eager=policy != QUEUED, seed=seed)
