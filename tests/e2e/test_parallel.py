"""A decode worker of two ranks beside a prefill worker of one: the same tokens split and local, and nothing stays when it is killed."""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from splitfire.cli.supervisor import Fleet
from tests.checkpoints import PICO, assert_greedy, pico_oracle
from tests.e2e.fleets import PROMPT, greedy, start_fleet, until


class UnequalFleet(Fleet):
    """Its decode workers have two ranks each."""

    def _add(self, name: str, arguments: Sequence[str]) -> None:
        super()._add(name, [*arguments, *(("--tensor-parallel=2",) if name.startswith("decode") else ())])


def test_two_ranks_decode_what_one_prefilled_and_what_they_prefill_themselves() -> None:
    small = ("--max-context=1024",)
    with start_fleet(
        str(PICO), router=("--split=auto",), worker=("--kv-memory=16MiB", *small), shared=small, kind=UnequalFleet
    ) as fleet:
        for prompt in (PROMPT, list(range(300, 1001))):  # one chunk, and several
            split = fleet.generate(greedy(prompt, 16))[0]
            assert split.summary.kv_transfer.bytes > 0, "its KV came from the other worker"
            assert_greedy(pico_oracle(), prompt, split.ids)
        fleet.assert_no_leaks()
        fleet.process("prefill-0").kill()
        until(lambda: len(fleet.status().workers) == 1)
        prompt = list(range(700, 1100))
        local = fleet.generate(greedy(prompt, 16))[0]
        assert not local.summary.kv_transfer.bytes
        assert_greedy(pico_oracle(), prompt, local.ids)
        fleet.assert_no_leaks()

        decode = fleet.process("decode-0")
        [follower] = decode.children()
        decode.kill()
        until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE)
