"""Clients that keep their connection and do not read: they cost what was written for them, and only for so long."""

from __future__ import annotations

import time

import grpc
import pytest

from splitfire.core import limits
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.e2e.fleets import LONG, refusal_of, until
from tests.faults.proc.sick_fleet import Ground, Watched, some_of_each

pytestmark = pytest.mark.timeout(300)
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10))  # a connection that buffers little


def wordy() -> pb.GenerateRequest:
    """Three megabytes: 8 choices with 20 alternatives for each token."""
    request = pb.GenerateRequest()
    request.CopyFrom(LONG)
    request.n, request.sampling.logprobs = 8, 20
    return request


def test_stalled_client_cancelled(ground: Ground) -> None:
    """F50, P18: when nothing could be written for 30 s it is told so, and all is freed; those beside it never notice."""
    with grpc.insecure_channel(ground.fleet.address, SMALL_WINDOW) as channel:
        stalled = inference_pb2_grpc.InferenceStub(channel).Generate(wordy(), timeout=300)
        next(stalled)
        began = time.monotonic()
        mates = Watched(ground.fleet, some_of_each(4, 400))
        mates.assert_right()
        until(lambda: time.monotonic() - began > limits.SLOW_CLIENT_S + 20, limits.SLOW_CLIENT_S + 60)
        ground.fleet.assert_no_leaks(30.0)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stalled:
                pass
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow_consumer")
    assert refusal.metadata["incomplete"] == "true"


def test_slow_client_bounded_memory(ground: Ground) -> None:
    """F49: twenty that read nothing cost the router less than a megabyte each, and decode does not wait for them."""
    router = ground.process("router")
    ground.fleet.ids(count=100)
    before = router.memory_info().rss
    slow = [ground.fleet.stub.Generate(LONG, timeout=300) for _ in range(20)]
    read = [len(next(call).token_ids) for call in slow]
    until(lambda: not any(w.running_sequences for w in ground.fleet.status().workers), 120)
    assert router.memory_info().rss - before < 20 << 20
    for call, offset in zip(slow, read, strict=True):
        assert offset + sum(len(r.token_ids) for r in call) == LONG.stopping.max_tokens
