"""The benchmark of hand-offs on one GPU, dry: real processes, real UCX, tiny blocks. A wrong byte must not pass for a fast hand-off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvloop

from benchmarks.gpu import handoff_ends, handoff_node
from benchmarks.gpu.handoff import DRY, DTYPES, num_different, path_row, transfer_rows
from benchmarks.gpu.handoff_ends import End, lanes_of_gpu_memory
from benchmarks.gpu.handoff_exposed import rows_of
from benchmarks.gpu.handoff_node import Node
from benchmarks.serve.answers import Answer
from kvtransfer.probe import PairRates
from splitfire.core.errors import ConfigError
from splitfire.core.machine import NETWORK, SHARED_MEMORY
from splitfire.engine.parallel.pack import pack
from tests.kvtransfer.nodes import until

TITLE = "[1795339984.240597] [vm:28338:0]   | ucp_context_0 intra-node cfg#0 | {:<55} |"
ROW = "[1795339984.240598] [vm:28338:0]   | {:>30} | {:<39} | {:<13} |"
PLANNED = [
    TITLE.format("tagged message by ucp_tag_send* from host memory"),
    ROW.format("8249..inf", "multi-frag eager copy-in copy-out", "sysv/memory"),
    TITLE.format("tagged message by ucp_tag_send*(multi) from cuda/GPU0"),
    ROW.format("0..8184", "cuda_copy, eager", "tcp/lo"),
    ROW.format("8K..inf", "(?) rendezvous zero-copy write to remote", "cuda_ipc/cuda"),
]
FELL_BACK = [
    TITLE.format("rendezvous data send from cuda/GPU0 to cuda/GPU0"),
    ROW.format("0..inf", "fragmented copy-in copy-out", "tcp/lo"),
]


def test_every_dtype_arrives_as_torch_would_have_made_it() -> None:
    rows = transfer_rows(replace(DRY, num_rounds=1))
    assert [row.metric for row in rows if row.met is False] == []
    checks = [row for row in rows if row.case.startswith("check")]
    assert len(checks) == len(DTYPES) and all(row.met and "63 compared" in row.metric for row in checks)
    timed = [row for row in rows if row.metric == "first pack to received"]
    assert len(timed) == len(DTYPES) and all(row.ours > 0 and row.opponent for row in timed)
    assert rows[0].metric == "pair's rate, shared memory" and rows[0].ours > 0


def test_an_end_that_does_not_answer_in_time_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff_ends, "START_S", 0.0)
    [row] = transfer_rows(DRY)
    assert row.met is False and "prefill end did not answer within 0 s" in row.metric


def test_an_end_that_dies_is_noticed_at_once(tmp_path: Path) -> None:
    end = End("decode", DRY.setup, tmp_path)
    end._process.kill()
    with pytest.raises(RuntimeError, match="decode end died"):
        end.result()
    end.kill()


def test_without_a_gpu_an_end_says_so_before_it_measures_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        Node("prefill", replace(DRY.setup, device="cuda"))


def meeting(scene: Callable[[Node, Node], Coroutine[Any, Any, None]]) -> None:
    """Both ends in this process."""

    async def play() -> None:
        async with asyncio.timeout(20):
            prefill, decode = Node("prefill", DRY.setup), Node("decode", DRY.setup)
            prefill.meet(decode.card())
            decode.meet(prefill.card())
            try:
                await scene(prefill, decode)
                await until(lambda: not prefill.agent.num_held_slots and not decode.agent.num_held_slots)
            finally:
                prefill.agent.close()
                decode.agent.close()

    uvloop.run(play())


def test_one_wrong_bit_in_the_pool_is_a_wrong_block_and_one_beside_it_too() -> None:
    blocks = [0, 5, DRY.setup.num_blocks - 1]

    async def scene(prefill: Node, decode: Node) -> None:
        prefill.fill(3)
        decode.expect(1, "int8")
        await prefill.ship(1)
        await decode.ready_at(1)
        expected = prefill.expected("int8", blocks)
        assert num_different(expected, decode.found("int8", blocks)) == decode.num_touched("int8") == 0
        raw = decode.pool("int8").raw
        raw[decode.ids[5], 77] ^= 1
        assert num_different(expected, decode.found("int8", blocks)) == 1
        raw[next(i for i in range(len(raw)) if i not in decode.ids), -1] ^= 1
        assert decode.num_touched("int8") == 1
        prefill.fill(4)
        assert num_different(expected, prefill.expected("int8", blocks)) == 3, "each hand-off has numbers of its own"

    meeting(scene)


def test_a_byte_that_changes_on_its_way_ends_the_hand_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaging(*args: Any, digest: bool) -> list[int]:
        sums = pack(*args, digest=digest)
        args[4][9] ^= 1
        return sums

    monkeypatch.setattr(handoff_node, "pack", damaging)

    async def scene(prefill: Node, decode: Node) -> None:
        prefill.fill(3)
        decode.expect(1, "bf16")
        with pytest.raises(RuntimeError, match="kv_digest_mismatch"):
            await prefill.ship(1)
        with pytest.raises(RuntimeError, match="kv_digest_mismatch"):
            await decode.ready_at(1)

    meeting(scene)


@pytest.mark.parametrize(
    ("log", "path", "is_met"),
    [
        pytest.param(PLANNED, SHARED_MEMORY, True, id="by ipc"),
        pytest.param(PLANNED, NETWORK, False, id="seen on the network"),
        pytest.param(PLANNED + FELL_BACK, SHARED_MEMORY, False, id="fell back"),
        pytest.param([], SHARED_MEMORY, False, id="not said"),
    ],
)
def test_only_what_ucx_says_it_moved_by_cuda_ipc_counts(log: list[str], path: str, is_met: bool) -> None:
    row = path_row("case", "cuda", PairRates(1e-5, 2e-5, 4e10, path), lanes_of_gpu_memory("\n".join(log)))
    assert row.met is is_met and row.ours == 40


def test_exposed_is_what_a_hand_off_adds_to_token_2() -> None:
    split = [Answer((0.1, 0.1 + gap, 0.2)) for gap in (0.015, 0.016, 0.09)]
    whole = [Answer((0.1, 0.1 + gap, 0.2)) for gap in (0.003, 0.003, 0.003)]
    row = rows_of("case", split, whole, is_dry=False)[-1]
    assert row.ours == pytest.approx(13) and row.met is False
    assert rows_of("case", split[:1], split[:1], is_dry=False)[-1].met is True
