"""Faults that only real processes have: killed before they began, drained with work in hand, ill, flooded, out of descriptors.

Killed and frozen in mid transfer and in mid stream they are in tests/e2e/test_handoff.py; docs/faults.md says what is where. Every
answer is compared with the same request on the whole fleet afterwards, and conftest.py looks for what is still held.
"""

from __future__ import annotations

import signal
import socket
import time
from contextlib import ExitStack

import grpc
import psutil
import pytest

from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.e2e.fleets import LONG, greedy, refusal_of, until
from tests.e2e.test_handoff import Asked, new_prompt
from tests.faults.proc.sick import BLOCKED_S, POISON
from tests.faults.proc.sick_fleet import LONG_PROMPT, NOT_SERVING, SERVING, Ground, Watched, frozen, some_of_each

LASTING = 1800  # tokens of an answer that is not over before its worker is


# -- prefill


def test_kill_prefill_before_start(ground: Ground) -> None:
    """F01: what was sent to it is in its socket, and goes to the others."""
    ground.heal()
    prefills = [ground.process(name) for name in ground.names("prefill")]
    with frozen(prefills):
        watched = Watched(ground.fleet, some_of_each(6, 20))
        until(lambda: ground.num_accepted == 6)
        prefills[0].kill()
    watched.assert_right()


def test_drain_prefill_finishes_transfers(ground: Ground) -> None:
    """F16, F17: SIGTERM in mid transfer. Probes are told at once; what it cannot finish is done elsewhere."""
    ground.heal()
    watched = Watched(ground.fleet, some_of_each(6, 20, LONG_PROMPT))
    leaving = ground.names("prefill")[0]
    ground.computes([leaving])
    ground.process(leaving).terminate()
    until(lambda: ground.health(leaving) == NOT_SERVING, 2)
    assert ground.exit_code(leaving, 40) == 0
    watched.assert_right()


# -- illness


@pytest.mark.parametrize("role", ["router", pytest.param("decode", marks=pytest.mark.long)])
def test_loop_block_no_false_eviction(ground: Ground, role: str) -> None:
    """F24: three seconds without a turn of the event loop are no death."""
    ground.heal()
    before = {w.incarnation for w in ground.fleet.status().workers}
    watched = Watched(ground.fleet, some_of_each(3, LASTING))
    watched.until(2)
    ill = ground.generating() if role == "decode" else role
    num_failed = len(ground.said("router", "attempt failed"))
    began = time.monotonic()
    ground.process(ill).send_signal(signal.SIGUSR2)
    watched.assert_right()
    until(lambda: time.monotonic() - began > BLOCKED_S + 1.5)
    assert before <= {w.incarnation for w in ground.fleet.status().workers}
    assert len(ground.said("router", "attempt failed")) == num_failed


def test_query_of_death_kills_at_most_three(ground: Ground) -> None:
    """F21, P6: whoever computes it dies. It is told what it is suspected of; those beside it never notice."""
    ground.heal()
    killed_before = ground.num_killed
    watched = Watched(ground.fleet, some_of_each(6, 40, 400))
    poison = Asked(ground.fleet, greedy([*POISON, *new_prompt(400)], 8))
    while not poison.is_over:
        ground.restart()
    with pytest.raises(grpc.RpcError) as caught:
        poison.join()
    ground.heal()
    assert 1 <= ground.num_killed - killed_before <= 3
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "request_suspected_poison")
    watched.assert_right()


def test_health_false_when_loop_dead(ground: Ground) -> None:
    """F23: a worker whose engine thread died is gone within two seconds, and its streams go on elsewhere."""
    ground.heal()
    watched = Watched(ground.fleet, some_of_each(3, LASTING))
    watched.until(2)
    ill = ground.generating()
    ground.process(ill).send_signal(signal.SIGUSR1)
    assert ground.exit_code(ill, 2.0) == 1
    assert ground.health(ill) != SERVING
    watched.assert_right()


# -- clients


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2])
def test_cancel_at_every_stage(ground: Ground, share: float) -> None:
    """F46 with long prompts: while they wait, in mid prefill and in mid transfer. Later ones are in test_lifecycle.py."""
    calls = [ground.fleet.stub.Generate(greedy(new_prompt(LONG_PROMPT), 50)) for _ in range(6)]
    if share:
        ground.computes(ground.names("prefill"), share)
    else:
        until(lambda: ground.fleet.status().running_requests)
    for call in calls:
        call.cancel()
    cancelled_at = time.monotonic()
    until(lambda: ground.fleet.is_quiet, 5)
    assert time.monotonic() - cancelled_at < 3.0  # a report and a chunk; on a busy machine more than the second of P5


def test_cancel_storm(ground: Ground) -> None:
    """F47, with 300 where the benchmark has a thousand: all cancelled at once. Those beside them are right, nothing is left."""
    watched = Watched(ground.fleet, some_of_each(2, LASTING))
    watched.until(2)
    with ExitStack() as stack:
        options = (("grpc.use_local_subchannel_pool", 1),)
        channels = [stack.enter_context(grpc.insecure_channel(ground.fleet.address, options=options)) for _ in range(2)]
        stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
        calls = [stubs[i % 2].Generate(LONG) for i in range(300)]
        until(lambda: ground.fleet.status().running_requests > 20, 30)
        for call in calls:
            call.cancel()
        until(lambda: ground.fleet.status().running_requests <= 2, 20)
        watched.assert_right()


@pytest.mark.long
def test_fd_exhaustion_refuses_new(ground: Ground) -> None:
    """F30: a router without descriptors keeps its streams, takes nobody new, and is as before when it has some again."""
    router = ground.process("router")
    watched = Watched(ground.fleet, some_of_each(2, LASTING))
    watched.until(2)
    before, limits = router.num_fds(), router.rlimit(psutil.RLIMIT_NOFILE)
    host, port = ground.fleet.address.split(":")
    router.rlimit(psutil.RLIMIT_NOFILE, (before + 8, limits[1]))
    try:
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
            until(lambda: router.num_fds() >= before + 8)
            channel = stack.enter_context(grpc.insecure_channel(ground.fleet.address, (("grpc.use_local_subchannel_pool", 1),)))
            with pytest.raises(grpc.RpcError):
                inference_pb2_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=1)
            watched.assert_right()
        with grpc.insecure_channel(ground.fleet.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert stub.ListModels(pb.ListModelsRequest(), timeout=10, wait_for_ready=True).models
    finally:
        router.rlimit(psutil.RLIMIT_NOFILE, limits)
    until(lambda: router.num_fds() <= before + 1, 20)
