"""Group A of bad inputs against a real server: a typed error on the wire, the process alive, batch mates unchanged, nothing held.

The ranges themselves are tested at the validator (tests/core/test_validation.py); here are the rows that need a socket, and
one from each kind of the others to see its status on the wire. HTTP rows (B47-B49) have no HTTP door yet: HTTP/1 is closed.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from splitfire.core import limits
from splitfire.v1 import inference_pb2 as pb
from tests.core.test_validation import BAD
from tests.e2e.fleets import LONG, PROMPT, SLOW, Refusal, RunningFleet, greedy, lasting, refusal_of, start_fleet, until

INVALID, EXHAUSTED, UNIMPLEMENTED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
)


@pytest.fixture(autouse=True)
def a_batch_mate_never_notices(pico: RunningFleet) -> Iterator[None]:
    """A long request runs beside every bad one; its tokens are what they are alone."""
    if not hasattr(pico, "expected_mate"):
        pico.expected_mate = pico.ids(count=60)  # type: ignore[attr-defined]
    mate = Mate(pico, count=60)
    yield
    assert mate.ids() == pico.expected_mate  # type: ignore[attr-defined]


class Mate:
    """A request that is in the middle of its answer when the constructor returns."""

    def __init__(self, pico: RunningFleet, count: int) -> None:
        self._ids: list[int] = []
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pico, count))
        self._thread.start()
        assert self._has_begun.wait(30)

    def ids(self) -> list[int]:
        self._thread.join(60)
        return self._ids

    def _run(self, pico: RunningFleet, count: int) -> None:
        for response in pico.stub.Generate(greedy(count=count), timeout=60):
            self._ids += response.token_ids
            self._has_begun.set()


def refused(pico: RunningFleet, request: pb.GenerateRequest, **call: Any) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in pico.stub.Generate(request, timeout=30, **call):
            pass
    refusal = refusal_of(caught.value)
    assert "/" not in refusal.message.replace("and/or", "").replace("http://", ""), "no paths (S10)"
    assert "Traceback" not in refusal.message
    assert "\n" not in refusal.message
    return refusal


def raw(pico: RunningFleet, data: bytes, method: str = "Generate") -> grpc.RpcError:
    """Bytes in place of a message."""
    call = pico.channel.unary_stream(
        f"/splitfire.v1.Inference/{method}", request_serializer=lambda b: b, response_deserializer=lambda b: b
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(call(data, timeout=30))
    return caught.value


@pytest.mark.parametrize(
    ("request_", "code", "reason", "field"),
    [
        (pb.GenerateRequest(), INVALID, "invalid_prompt", "prompt"),
        (pb.GenerateRequest(text="x", prompt_token_ids=[1]), INVALID, "invalid_prompt", "prompt"),
        (greedy([4096]), INVALID, "invalid_prompt_token_ids", "prompt_token_ids[0]"),
        (greedy(PROMPT, 10**6), INVALID, "exceeds_context", "stopping.max_tokens"),
        (greedy([5] * 2048, 1), INVALID, "exceeds_context", "prompt"),
        (greedy(PROMPT, 0), INVALID, "invalid_max_tokens", "stopping.max_tokens"),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=float("nan"))),
            INVALID,
            "invalid_temperature",
            "sampling.temperature",
        ),
        (greedy(n=10**6), INVALID, "invalid_n", "n"),
        (greedy(adapter="x"), UNIMPLEMENTED, "unsupported_adapter", "adapter"),
        (greedy(predicted_output="x = 1\n" * 2000), INVALID, "invalid_predicted_output", "predicted_output"),
        (greedy(model="other"), grpc.StatusCode.NOT_FOUND, "model_not_found", "model"),
        (greedy(request_id="a\nb"), INVALID, "invalid_request_id", "request_id"),
        (greedy(metadata={"chat_template": "x"}), grpc.StatusCode.PERMISSION_DENIED, "forbidden_metadata", "metadata"),
    ],
)
def test_errors_carry_code_reason_and_field(
    pico: RunningFleet, request_: pb.GenerateRequest, code: grpc.StatusCode, reason: str, field: str
) -> None:
    refusal = refused(pico, request_)
    assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
    assert not refusal.is_retryable
    assert refusal.metadata["retryable"] == "false"


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/", "pico/../pico", "./pico"])
def test_a_model_name_is_no_path(pico: RunningFleet, name: str) -> None:
    """B26: it is compared, never looked up."""
    with pytest.raises(grpc.RpcError) as caught:
        list(pico.stub.Generate(greedy(model=name), timeout=10))
    assert refusal_of(caught.value).reason == "model_not_found"


def test_every_bad_field_at_once_beside_a_running_request(pico: RunningFleet) -> None:
    """P6: all rows of the validator's table over the wire, and requests at the edges of what is accepted, while one streams."""
    expected = pico.ids(count=400)
    mate = Mate(pico, 400)
    for name, message, field in BAD:
        assert refused(pico, message).field == field, name
    edges = pb.SamplingParams(
        temperature=100.0, repetition_penalty=5e-324, presence_penalty=2.0, frequency_penalty=-2.0, seed=2**63 - 1, top_p=5e-324,
        logit_bias={i: (-100.0 if i % 2 else 100.0) for i in range(300)}, logprobs=20,
    )  # fmt: skip
    for sampling in (edges, pb.SamplingParams(temperature=5e-324), pb.SamplingParams(min_p=1.0, top_k=1, repetition_penalty=100.0)):
        request = greedy(count=20)
        request.sampling.CopyFrom(sampling)
        assert len(pico.generate(request)[0].ids) == 20
    assert mate.ids() == expected


def test_refusals_name_the_request(pico: RunningFleet) -> None:
    """The error contract: the client's own id if it can be used, one that was drawn if not."""
    assert refused(pico, greedy(request_id="mine", n=99)).metadata["request_id"] == "mine"
    assert len(refused(pico, greedy(n=99)).metadata["request_id"]) == 24
    assert len(refused(pico, greedy(request_id="a\nb")).metadata["request_id"]) == 24


def test_refusals_are_fast(pico: RunningFleet) -> None:
    """P17."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        refused(pico, greedy(n=99))
        times.append(time.perf_counter() - began)
    assert sorted(times)[10] < 0.05


def test_a_message_over_the_limit_is_refused_before_it_is_parsed(pico: RunningFleet) -> None:
    """B06."""
    assert refused(pico, pb.GenerateRequest(text="x" * (limits.MAX_MESSAGE_BYTES + 10))).code is EXHAUSTED


def test_a_message_that_unpacks_over_the_limit_is_refused(pico: RunningFleet) -> None:
    """B42: 64 MB of zeros in 64 KB."""
    request = pb.GenerateRequest(text="\0" * (64 << 20))
    assert len(gzip.compress(request.SerializeToString())) < 100_000
    assert refused(pico, request, compression=grpc.Compression.Gzip).code is EXHAUSTED


@pytest.mark.parametrize(
    "data",
    [
        b"\x1a\x03\xff\xfe\xfd",  # B08: text that is not UTF-8
        b"\xff" * 30,  # B41: a varint that does not end
        b"\x1a\xff\xff\xff\xff\x0f",  # a length past the end
        b"\x0b" * 200,  # groups, nested
        b"2\x02" * 3 + b"\x08",  # wrong wire types
        b"\x80\x04\x95K\x00.",  # B87: a pickle
    ],
)
def test_bytes_that_are_no_message(pico: RunningFleet, data: bytes) -> None:
    for method in ("Generate", "Tokenize", "ListModels", "GetFleet"):
        refusal = refusal_of(raw(pico, data, method))
        assert refusal.code is INVALID, method
        assert refusal.reason in ("invalid_message", "invalid_unknown_field")


def test_fields_nobody_knows_are_refused(pico: RunningFleet) -> None:
    """B37, B21, B23, B27."""
    data = greedy().SerializeToString() + b"\xf2\x06\x04evil"
    assert refusal_of(raw(pico, data)).reason == "invalid_unknown_field"


def test_a_slow_prompt_is_bounded_and_holds_nobody_up(pico: RunningFleet) -> None:
    """B07."""
    request = pb.GenerateRequest(text="a" * 10**6, stopping=pb.StoppingParams(max_tokens=1))
    assert refused(pico, request).reason in ("exceeds_context", "tokenization_timeout")


def test_a_request_id_is_used_once_at_a_time(pico: RunningFleet) -> None:
    """B32, F64."""
    call = pico.stub.Generate(lasting("mine"))
    next(call)
    refusal = refused(pico, greedy(request_id="mine"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "duplicate_request_id")
    call.cancel()
    until(lambda: len(pico.generate(greedy(count=2, request_id="mine"))) == 1)


@pytest.mark.parametrize("timeout", [-1.0, 0.0])
def test_a_deadline_that_has_passed(pico: RunningFleet, timeout: float) -> None:
    """B38."""
    with pytest.raises(grpc.RpcError) as caught:
        list(pico.stub.Generate(greedy(), timeout=timeout))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_in_ten_years_is_clamped(pico: RunningFleet) -> None:
    assert len(pico.generate(greedy(count=3), timeout=10 * 365 * 86400.0)[0].ids) == 3


@pytest.mark.parametrize("metadata", [[("k" * 10, "v" * 2**20)], [(f"key{i}", "v") for i in range(10_000)]])
def test_metadata_over_the_limit(pico: RunningFleet, metadata: list[tuple[str, str]]) -> None:
    """B39."""
    channel = grpc.insecure_channel(pico.address, options=(("grpc.use_local_subchannel_pool", 1),))
    stub = type(pico.stub)(channel)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(greedy(), timeout=10, metadata=tuple(metadata)))
    assert caught.value.code() in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
    channel.close()


def test_identity_in_metadata_changes_nothing(pico: RunningFleet) -> None:
    """B35: tenants come from credentials; until there are any, such metadata has no meaning."""
    expected = pico.ids(count=5)
    metadata = (("tenant_id", "admin"), ("cache_salt", "x"), ("x-priority", "system"))
    assert pico.generate(greedy(count=5), metadata=metadata)[0].ids == expected


OTHER_PROTOCOLS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",  # B46, B47
    b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    bytes(range(256)) * 8,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
]


@pytest.mark.parametrize("data", OTHER_PROTOCOLS)
def test_other_protocols_on_the_port_are_closed(pico: RunningFleet, data: bytes) -> None:
    host, port = pico.address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass  # until it is closed; a timeout fails the test


def test_garbage_does_not_fill_the_log(pico: RunningFleet) -> None:
    """B46: whoever knocks at the port three hundred times does not write three hundred lines."""
    host, port = pico.address.split(":")
    [router] = [child for child in pico.fleet.children if child.name == "router"]
    before = router.log.stat().st_size
    for data in OTHER_PROTOCOLS * 50:
        with socket.create_connection((host, int(port)), timeout=10) as connection, contextlib.suppress(OSError):
            connection.sendall(data)
    assert len(pico.ids(count=2)) == 2
    assert router.log.stat().st_size - before < 4096


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name_index: bytes, value: bytes) -> bytes:
    """A header field of HPACK: name from the static table, value as it stands."""
    return name_index + bytes([len(value)]) + value


# POST, http, :path, :authority, content-type: what a gRPC client sends before its message.
CALL = (
    b"\x83\x86"
    + literal(b"\x04", b"/splitfire.v1.Inference/Generate")
    + literal(b"\x01", b"x")
    + literal(b"\x0f\x10", b"application/grpc")
)


@pytest.mark.parametrize(
    "attack",
    ["rapid reset", "ping flood", "settings flood", "continuation flood", "streams without requests", "bad base64", "tiny window"],
)
def test_http2_floods_do_not_hold_up_others(pico: RunningFleet, attack: str) -> None:
    """B45, F48: the connection may be closed; everybody else goes on."""
    host, port = pico.address.split(":")
    message = greedy(count=5).SerializeToString()
    framed = b"\0" + len(message).to_bytes(4, "big") + message  # a gRPC message, uncompressed
    num_frames = 60 if attack == "tiny window" else 5000  # each of these is a request that is served, and never read
    window = b"\0\x04\0\0\0\x01" if attack == "tiny window" else b""  # SETTINGS_INITIAL_WINDOW_SIZE = 1
    floods: dict[str, Callable[[int], bytes]] = {
        "rapid reset": lambda i: http2_frame(1, 4, 2 * i + 1, CALL) + http2_frame(3, 0, 2 * i + 1, b"\0\0\0\x08"),
        "continuation flood": lambda i: http2_frame(9, 0, 1, b"\x40\x01a\x01b" * 200) if i else http2_frame(1, 0, 1, CALL),
        "streams without requests": lambda i: http2_frame(1, 4, 2 * i + 1, CALL),
        "bad base64": lambda i: http2_frame(1, 4, 2 * i + 1, CALL + b"\x00\x05x-bin\x04!!!!"),  # B39
        "tiny window": lambda i: http2_frame(1, 4, 2 * i + 1, CALL) + http2_frame(0, 1, 2 * i + 1, framed),
        "ping flood": lambda i: http2_frame(6, 0, 0, i.to_bytes(8, "big")),
        "settings flood": lambda i: http2_frame(4, 0, 0, b""),
    }
    one = floods[attack]
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, window))
        connection.settimeout(0.5)
        try:
            for i in range(num_frames):
                connection.sendall(one(i))
        except OSError:
            pass
        began = time.perf_counter()
        assert len(pico.ids(count=3)) == 3
        assert time.perf_counter() - began < 5


def test_many_idle_connections_and_streams(pico: RunningFleet) -> None:
    """B44, scaled to this machine: idle connections cost nobody anything; streams over the limit wait or are refused."""
    host, port = pico.address.split(":")
    idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(300)]
    calls = [pico.stub.Generate(greedy(count=2, request_id=f"many-{i}"), timeout=60) for i in range(300)]
    finished = sum(1 for call in calls if _ended_well(call))
    for connection in idle:
        connection.close()
    assert finished == 300


def _ended_well(call: Iterator[pb.GenerateResponse]) -> bool:
    try:
        return sum(len(r.token_ids) for r in call) == 2
    except grpc.RpcError as exc:
        # Over the limit of streams HTTP/2 answers REFUSED_STREAM, which gRPC calls UNAVAILABLE and clients may retry.
        return exc.code() in (EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


def test_tokenize_checks_like_generate(pico: RunningFleet) -> None:
    for request in (pb.TokenizeRequest(), pb.TokenizeRequest(text="x", messages=[pb.ChatMessage(role="user", content="y")])):
        with pytest.raises(grpc.RpcError) as caught:
            pico.stub.Tokenize(request, timeout=10)
        assert refusal_of(caught.value).reason == "invalid_prompt"
    with pytest.raises(grpc.RpcError) as caught:
        pico.stub.Tokenize(pb.TokenizeRequest(text="x", model="nope"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def test_reflection_is_on_for_loopback(pico: RunningFleet) -> None:
    reflect = pico.channel.stream_stream(REFLECT, lambda b: b, lambda b: b)
    [answer] = list(reflect(iter([b"\x3a\x00"]), timeout=5))  # list_services
    assert b"splitfire.v1.Inference" in answer
    assert b"splitfire.v1.Fleet" not in answer


def test_reflection_is_off_when_the_operator_says_so(pico: RunningFleet) -> None:
    """B50, S6."""
    with start_fleet("pico", prefill=0, router=("--no-reflection",)) as fleet:
        reflect = fleet.channel.stream_stream(REFLECT, lambda b: b, lambda b: b)
        with pytest.raises(grpc.RpcError) as refused_reflection:
            list(reflect(iter([b"\x3a\x00"]), timeout=5))
        assert refused_reflection.value.code() is UNIMPLEMENTED
        attach = fleet.channel.unary_unary("/splitfire.v1.Fleet/Attach", lambda b: b, lambda b: b)
        with pytest.raises(grpc.RpcError) as caught:
            attach(b"", timeout=5)
        assert caught.value.code() is UNIMPLEMENTED, "workers' methods are not on the clients' port"


def test_a_queue_that_is_full_refuses_at_once_with_a_hint(pico: RunningFleet) -> None:
    """P17, F53."""
    with start_fleet("pico", prefill=0, router=("--max-requests=1", "--max-queued=1"), worker=SLOW) as fleet:
        running = fleet.stub.Generate(LONG)
        next(running)
        waiting = fleet.stub.Generate(greedy(count=2))
        until(lambda: fleet.status().queued_requests == 1)
        took_s = []
        for _ in range(3):  # this process may be kept waiting itself
            began = time.perf_counter()
            refusal = refused(fleet, greedy(count=2))
            took_s.append(time.perf_counter() - began)
        assert min(took_s) < 0.5
        assert (refusal.code, refusal.reason, refusal.is_retryable) == (EXHAUSTED, "queue_full", True)
        assert next(running).token_ids, "at once: the other still runs"
        running.cancel()
        assert sum(len(r.token_ids) for r in waiting) == 2
        fleet.assert_no_leaks()


def test_what_waited_too_long_is_refused(pico: RunningFleet) -> None:
    """P17: `--max-queued-s`. Who runs meanwhile goes on."""
    with start_fleet("pico", prefill=0, router=("--max-requests=1", "--max-queued-s=0.2"), worker=SLOW) as fleet:
        running = fleet.stub.Generate(LONG)
        next(running)
        refusal = refused(fleet, greedy(count=2))
        assert (refusal.code, refusal.reason, refusal.is_retryable) == (EXHAUSTED, "queue_full", True)
        assert "waited 0.2 s for a worker" in refusal.message
        assert fleet.status().running_requests == 1
        assert len(next(running).token_ids) > 0
        running.cancel()
        fleet.assert_no_leaks()
