"""Rows from measured steps: each beside its floor, variants beside the engine as it comes. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.engine.floors import Work, decode, prefill, weight_bytes
from benchmarks.engine.machine import Machine
from benchmarks.report import Row, half_spread
from splitfire.core.layout import KvLayout
from splitfire.core.model_config import ModelConfig
from splitfire.core.settings import WorkerSettings

# Times its floor that a decode step may take, by context and streams: of the engine as it comes.
AT_MOST = {(300, 1): 1.25, (300, 4): 1.25, (300, 16): 1.7, (4096, 8): 1.5}
KV_CASE = (4096, 8)  # where an int8 pool has to be as fast as a bf16 one
KV_INT8 = "bf16, KV int8"
MIN_TOKENS = 1.9  # times the tokens that an int8 pool has to hold


Case = tuple[int, int] | int  # context and streams of decode steps, or a prompt's tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant: medians of its turns in seconds, decode steps by context and streams, prompts by tokens."""

    settings: WorkerSettings
    config: ModelConfig
    layout: KvLayout
    decodes: dict[tuple[int, int], list[float]]
    prefills: dict[int, list[float]]

    @property
    def is_int8(self) -> bool:
        return getattr(self.settings, "weights", "") == "int8"

    @property
    def num_weight_bytes(self) -> int:
        return weight_bytes(self.config, "int8" if self.is_int8 else "", self.settings.dtype)

    def decode_work(self, context: int, streams: int) -> Work:
        return decode(self.config, self.layout, self.num_weight_bytes, streams, context, self.is_int8)

    def prefill_work(self, num_tokens: int) -> Work:
        return prefill(self.config, self.layout, self.num_weight_bytes, num_tokens, self.is_int8)


def rows_of(taken: Mapping[str, Measured], machines: Mapping[Case, Machine], baseline: str) -> list[Row]:
    """`machines`: what the machine could do while a case was measured."""
    machine = Machine.median(list(machines.values()))
    rows = [
        _fact("this machine", "memory read", "GB/s", machine.read_bytes_per_s / 1e9),
        _fact("this machine", "products of fp32 or bf16", "GFLOP/s", machine.float_ops_per_s / 1e9),
        _fact("this machine", "products of int8", "Gop/s", machine.int8_ops_per_s / 1e9),
    ]
    for name, measured in taken.items():
        for (context, streams), times in measured.decodes.items():
            case = f"{name}: decode, {streams} streams at {context}"
            work, machine = measured.decode_work(context, streams), machines[context, streams]
            bound = AT_MOST.get((context, streams)) if name == baseline else None
            rows.append(_beside_floor(case, "one step", times, work, machine, bound))
            used = [work.num_bytes / t / machine.read_bytes_per_s * 100 for t in times]
            rows.append(Row(case, "MBU", "%", statistics.median(used), None, "", None, "", None, half_spread(used)))
            if name != baseline and baseline in taken:
                rows.append(_beside_baseline(case, name, (context, streams), times, taken[baseline], baseline))
        for num_tokens, times in measured.prefills.items():
            case, work = f"{name}: prefill, {num_tokens} tokens", measured.prefill_work(num_tokens)
            rows.append(_beside_floor(case, "first token", times, work, machines[num_tokens], None))
    if baseline in taken and KV_INT8 in taken:
        ours, theirs = taken[KV_INT8].layout.token_bytes, taken[baseline].layout.token_bytes
        words, met = f"at least {MIN_TOKENS}x the tokens", theirs / ours >= MIN_TOKENS
        rows.append(Row("KV int8", "bytes a token", "B", ours, theirs, "KV bf16", theirs / ours, words, met, 0.0))
    return rows


def _beside_floor(case: str, metric: str, times: list[float], work: Work, machine: Machine, bound: float | None) -> Row:
    ms, floor_ms = [t * 1e3 for t in times], work.floor_s(machine) * 1e3
    ours = statistics.median(ms)
    words, met = ("", None) if bound is None else (f"at most {bound}x its floor", ours <= bound * floor_ms)
    return Row(case, metric, "ms", ours, floor_ms, work.words(machine), floor_ms / ours, words, met, half_spread(ms))


def _beside_baseline(case: str, name: str, at: tuple[int, int], times: list[float], baseline: Measured, baseline_name: str) -> Row:
    ours, theirs = statistics.median(times), statistics.median(baseline.decodes[at])
    is_owed = name == KV_INT8 and at == KV_CASE
    words, met = ("at least as fast as a bf16 pool", theirs >= ours) if is_owed else ("", None)
    return Row(
        case, "one step", "ms", ours * 1e3, theirs * 1e3, baseline_name, theirs / ours, words, met, half_spread(times) * 1e3
    )  # fmt: skip


def _fact(case: str, metric: str, unit: str, value: float) -> Row:
    return Row(case, metric, unit, value, None, "", None, "", None, 0.0)
