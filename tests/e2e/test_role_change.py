"""A worker takes on the other role under load: clients notice nothing, and it does the new work afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import ROOT
from tests.e2e.fleets import RunningFleet, generated_at, greedy, start_fleet, until

PREFILL, DECODE = pb.ROLE_PREFILL, pb.ROLE_DECODE


def splitfire(*arguments: str) -> str:
    command = [sys.executable, "-m", "splitfire.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout


def has_role(fleet: RunningFleet, worker: str, role: pb.Role.ValueType) -> bool:
    return any(w.worker_id == worker and w.role == role and w.state == "ready" for w in fleet.status().workers)


class Load:
    """Clients that ask one thing after another until they are told to stop; every answer is compared."""

    def __init__(self, fleet: RunningFleet, num_clients: int) -> None:
        self._fleet = fleet
        self._prompts = [[(7 * i + 3 * c) % 4000 for i in range(150 + 40 * c)] for c in range(num_clients)]
        self._expected = [fleet.ids(prompt, 80) for prompt in self._prompts]
        self._stop = threading.Event()
        self.num_answers = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(c,)) for c in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        while not self._stop.is_set():
            try:
                if self._fleet.ids(self._prompts[client], 80) != self._expected[client]:
                    self.wrong.append("other tokens")
            except (grpc.RpcError, AssertionError) as exc:
                self.wrong.append(str(exc))
            self.num_answers += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def test_roles_change_under_load_and_no_client_notices() -> None:
    """One of each role swaps: each is the same process as before, does the other's work, and KV moves to and from it."""
    with start_fleet("pico", prefill=2, decode=2) as fleet, ThreadPoolExecutor(8) as pool:
        before = {w.worker_id: w.incarnation for w in fleet.status().workers}
        load = Load(fleet, 3)
        try:
            for worker, role in (("decode-1", PREFILL), ("prefill-0", DECODE)):
                name = pb.Role.Name(role).removeprefix("ROLE_").lower()
                assert worker in splitfire("role", worker, name, "--server", fleet.address)
                until(lambda worker=worker, role=role: has_role(fleet, worker, role), 30, lambda: str(fleet.status()))  # type: ignore[misc]
                answered = load.num_answers
                until(lambda answered=answered: load.num_answers >= answered + 4, 30)  # type: ignore[misc]
        finally:
            load.stop()
        assert load.wrong == []
        assert has_role(fleet, "prefill-1", PREFILL)
        assert has_role(fleet, "decode-0", DECODE)
        assert {w.worker_id: w.incarnation for w in fleet.status().workers} == before
        done: set[tuple[str, str]] = set()
        for i in range(10):  # so many at once that one of a role is not enough
            prompts = [[100 * i + c, *range(900)] for c in range(8)]
            for summary in pool.map(lambda prompt: fleet.generate(greedy(prompt, 4))[0].summary, prompts):
                assert summary.kv_transfer.bytes > 0
                done |= {(phase.name, phase.worker) for phase in summary.phases}
                done |= {("decode", worker) for worker in generated_at(summary)}
            if {("prefill", "decode-1"), ("decode", "prefill-0")} <= done:
                break
        else:
            raise AssertionError(f"who changed does nothing: {done}")
        assert "placed by cost\n  * " in splitfire("fleet", "--last", "2", "--server", fleet.address)
        until(lambda: len(fleet.status().pairs) == 4)
        fleet.assert_no_leaks(10)
