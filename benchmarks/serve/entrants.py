"""Which servers enter which comparison, and with which settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.opponents import openvino, vllm
from benchmarks.serve.contestants import OURS, Lineup
from benchmarks.serve.fleets import Cores

# Ours in other clothes, which targets of a split fleet speak of.
OURS_ONE_CORE, OURS_AGGREGATED = "Splitfire on one core", "Splitfire aggregated"
VLLM, VLLM_SPLIT, OPENVINO = "vLLM", "vLLM split", "OpenVINO GenAI"


def add_ours(lineup: Lineup, args: argparse.Namespace, cores: Cores, client_cpus: Sequence[int]) -> None:
    """The first is ours as it comes (with --flag); those of --also have their flags in their name."""
    lineup.ours(OURS, cores, args.flag, client_cpus)
    for flags in args.also:
        lineup.ours(f"{OURS} {flags}", cores, [*args.flag, *flags.split()], client_cpus)


def add_vllm(lineup: Lineup, cpus: Sequence[int], dtype: str, flags: Sequence[str] = (), label: str = "") -> None:
    if not lineup.wants("vllm"):
        return
    name = f"vLLM {dtype}{label}, cores {','.join(map(str, cpus))}"
    lineup.theirs(VLLM, vllm.why_not(), lambda path: vllm.aggregated(name, path, cpus, dtype, flags), vllm.versions, cpus)


def add_vllm_split(lineup: Lineup, prefill: Sequence[int], decode: Sequence[int], dtype: str) -> None:
    if not lineup.wants("vllm-split"):
        return
    name = f"vLLM split {dtype}, cores {','.join(map(str, prefill))} + {','.join(map(str, decode))}"
    lineup.theirs(VLLM_SPLIT, vllm.why_not(), lambda path: vllm.split(name, path, prefill, decode, dtype), vllm.versions, prefill)


def add_openvino(lineup: Lineup, cpus: Sequence[int], flags: Sequence[str] = (), label: str = "") -> None:
    if not lineup.wants("openvino"):
        return
    name = f"OpenVINO GenAI f16{label}, cores {','.join(map(str, cpus))}"
    lineup.theirs(OPENVINO, openvino.why_not(), lambda path: openvino.server(name, path, cpus, flags), openvino.versions, cpus)
