"""Workers that go on purpose, one after the other, all of a role, or without going: what is left of the fleet goes on."""

from __future__ import annotations

import signal
import time
from functools import partial

import grpc
import pytest

from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import greedy, refusal_of, until
from tests.e2e.test_handoff import new_prompt
from tests.faults.proc.clients import Clients, requests_of
from tests.faults.proc.sick import HANG, HANGS_AFTER_S
from tests.faults.proc.sick_fleet import Ground, Watched, sick_fleet, some_of_each
from tests.faults.proc.up import up

pytestmark = pytest.mark.timeout(300)
LASTING = 1000


@pytest.mark.parametrize("router", [("--split=always",), ("--split=auto", "--no-local-fallback")], ids=" ".join)
def test_without_prefill_workers_a_fleet_that_may_not_fall_back_says_so(router: tuple[str, ...]) -> None:
    """F11, with the fallback off: an answer within two seconds, and all is well when they are back. Who was streaming goes on."""
    with sick_fleet(prefill=1, decode=1, router=router) as ground:
        streaming = Watched(ground.fleet, some_of_each(2, LASTING))
        streaming.until(2)
        ground.process("prefill-0").kill()
        killed_at = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            ground.fleet.ids(new_prompt(50), 4)
        assert time.monotonic() - killed_at < 2.0
        refusal = refusal_of(caught.value)
        assert (refusal.code, refusal.reason, refusal.is_retryable) == (grpc.StatusCode.UNAVAILABLE, "no_prefill", True)
        ground.heal()
        streaming.assert_right()
        ground.fleet.assert_no_leaks(20.0)


def test_without_prefill_workers_decode_computes_prompts_itself() -> None:
    """F11, with the fallback on: killed in the middle of their prompts, and nobody to take over but decode."""
    with sick_fleet(prefill=1, decode=1, router=("--split=auto",)) as ground:
        watched = Watched(ground.fleet, some_of_each(4, 20, 800))
        ground.computes(["prefill-0"])
        ground.process("prefill-0").kill()
        watched.assert_right()
        answer = ground.fleet.generate(greedy(new_prompt(200), 5))[0]
        assert not answer.summary.kv_transfer.bytes
        ground.heal()
        ground.fleet.assert_no_leaks(20.0)


def test_a_second_sigterm_ends_a_worker_at_once(ground: Ground) -> None:
    """F16: and its streams go on elsewhere."""
    ground.heal()
    watched = Watched(ground.fleet, some_of_each(3, LASTING))
    watched.until(2)
    leaving = ground.generating()
    ground.process(leaving).terminate()
    until(lambda: any(w.is_draining for w in ground.fleet.status().workers))
    ground.process(leaving).terminate()
    assert ground.exit_code(leaving, 8) == 0
    watched.assert_right()


@pytest.mark.parametrize("role", [pb.ROLE_PREFILL, pb.ROLE_DECODE])
def test_an_idle_worker_that_is_told_to_go_is_gone_at_once(ground: Ground, role: pb.Role.ValueType) -> None:
    """F16, idle: nothing is held, so nothing is waited for."""
    ground.heal()
    leaving = "prefill-1" if role == pb.ROLE_PREFILL else "decode-1"
    ground.process(leaving).terminate()
    assert ground.exit_code(leaving, 8) == 0
    assert len(ground.fleet.ids(new_prompt(50), 4)) == 4


def test_a_hung_engine_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """F23: a step that never ends, with the minute it is given made short. Its streams go on elsewhere."""
    monkeypatch.setenv(HANG, "1")
    with sick_fleet(prefill=1, decode=2) as ground:
        watched = Watched(ground.fleet, some_of_each(3, LASTING))
        watched.until(2)
        ill = ground.generating()
        ground.process(ill).send_signal(signal.SIGUSR1)
        assert ground.exit_code(ill, HANGS_AFTER_S + 15.0) == 1
        watched.assert_right()
        ground.heal()
        ground.fleet.assert_no_leaks(20.0)


def test_rolling_restart_zero_lost() -> None:
    """F18: every worker in turn is told to go under load, and started again by `splitfire up`."""
    with up(2, 2, environment={"SPLITFIRE_PREFIX_CACHE": "false"}) as fleet:
        requests = requests_of(240, 128, 64)
        expected = [outcome.ids for outcome in Clients([fleet.stub() for _ in range(4)], requests).join()]
        clients = Clients([fleet.stub() for _ in range(4)], requests)
        restarted = []
        for name in ("prefill-0", "decode-0", "prefill-1", "decode-1"):
            fleet.wait_whole()
            if clients.are_over:
                break
            process = fleet.child(name)
            assert process is not None
            process.terminate()
            until(partial(fleet.has_other, name, process), 90)
            restarted.append(name)
        outcomes = clients.join()
        assert len(restarted) >= 2
        assert not [o.refusal for o in outcomes if o.refusal is not None]
        assert [o.ids for o in outcomes] == expected
        fleet.wait_whole()
        until(fleet.is_quiet, 20)


def test_router_pair_failover() -> None:
    """F13: one of two that share a port dies. Its open streams are lost and nothing else; the other one knows every worker."""
    with up(1, 1, "--routers=2") as fleet:
        requests = requests_of(160, 64, 32)
        expected = [outcome.ids for outcome in Clients([fleet.stub()], requests).join()]
        clients = Clients([fleet.stub() for _ in range(8)], requests)
        until(lambda: len(clients.outcomes) > 20, 60)
        router = fleet.child("router-0")
        assert router is not None
        router.kill()
        outcomes = clients.join()
        lost = [o for o in outcomes if o.refusal is not None]
        assert len(lost) <= 8, "one stream of each client at most"
        for outcome in outcomes:
            assert outcome.is_contiguous
            assert expected[outcome.number][: len(outcome.ids)] == outcome.ids
            assert outcome.refusal is not None or outcome.ids == expected[outcome.number]
        until(partial(fleet.has_other, "router-0", router), 30)
        fleet.wait_whole()
        until(fleet.is_quiet, 20)
