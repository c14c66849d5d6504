"""A fleet with tenants: what each credential opens on either port, what tenants share, and keys that change while streams run."""

from __future__ import annotations

import hashlib
import re
import secrets
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from splitfire.cli.credentials import key as make_key
from splitfire.v1 import fleet_pb2, inference_pb2, inference_pb2_grpc
from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import LONG, PROMPT, Refusal, RunningFleet, greedy, lasting, refusal_of, start_fleet, until
from tests.e2e.test_cli import splitfire

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
Metadata = tuple[tuple[str, str], ...]
METHODS = [
    method
    for file in (inference_pb2.DESCRIPTOR, fleet_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
]
FOR_ADMINISTRATORS = {"splitfire.v1.Inference.GetFleet", "splitfire.v1.Admin.ChangeRole"}


def key(name: str) -> str:
    return f"sf-{name}-{'k' * 32}"


def bearer(name: str) -> Metadata:
    return (("authorization", f"Bearer {key(name)}"),)


def table(name: str, *lines: str) -> str:
    return "\n".join((f"[tenant.{name}]", f'keys = ["sha256:{hashlib.sha256(key(name).encode()).hexdigest()}"]', *lines, ""))


TENANTS = "".join(
    (
        table("alice", 'class = "interactive"'),
        table("bob", 'class = "batch"'),
        table("small", "tokens_per_minute = 150"),
        table("narrow", "max_running = 1", "max_queued = 0"),
        table("ops", "admin = true", "allow_special = true"),
        table("old", f"expires = {datetime.now(UTC).date() - timedelta(days=2)}"),
    )
)


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.touch(mode=0o600)
    path.write_text(TENANTS)
    return path


@pytest.fixture(scope="module")
def shared(keys_file: Path) -> Iterator[RunningFleet]:
    with start_fleet("pico", router=("--split=always", f"--keys-file={keys_file}")) as fleet:
        yield fleet
        said = "".join(child.log.read_text() for child in fleet.fleet.children)
        assert "k" * 32 not in said, "no key is ever logged (S15)"


def num_open(fleet: RunningFleet) -> int:
    status = fleet.stub.GetFleet(pb.GetFleetRequest(), metadata=bearer("ops"), timeout=10)
    return status.running_requests + status.queued_requests


@pytest.fixture
def fleet(shared: RunningFleet) -> Iterator[RunningFleet]:
    yield shared
    until(lambda: not num_open(shared))


def generate(fleet: RunningFleet, name: str, request: pb.GenerateRequest, *more: tuple[str, str]) -> Any:
    return fleet.generate(request, metadata=(*bearer(name), *more))[0]


def call(channel: grpc.Channel, method: MethodDescriptor | str, metadata: Metadata, data: bytes = b"\xff") -> grpc.RpcError:
    """The error that bytes which are no message get; whoever is let through learns that they are none."""
    if isinstance(method, str):
        path, streams = method, False
    else:
        path, streams = f"/{method.containing_service.full_name}/{method.name}", method.client_streaming
    invoke: Any = channel.stream_stream(path) if streams else channel.unary_stream(path)
    with pytest.raises(grpc.RpcError) as caught:
        list(invoke(iter([data]) if streams else data, metadata=metadata, timeout=10))
    return caught.value


def refused(fleet: RunningFleet, request: pb.GenerateRequest, metadata: Metadata) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        list(fleet.stub.Generate(request, metadata=metadata, timeout=30))
    return refusal_of(caught.value)


def worker_port(fleet: RunningFleet) -> str:
    return str(fleet.stub.GetFleet(pb.GetFleetRequest(), metadata=bearer("ops"), timeout=10).worker_ports[0])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_every_method_requires_auth(fleet: RunningFleet, method: MethodDescriptor) -> None:
    """S3, S6, B50, B53: every method of every service, by the descriptors."""
    is_workers = method.containing_service.full_name == "splitfire.v1.Fleet"
    with grpc.insecure_channel(worker_port(fleet) if is_workers else fleet.address) as channel:
        assert call(channel, method, ()).code() is UNAUTHENTICATED
        assert call(channel, method, bearer("nobody")).code() is UNAUTHENTICATED
        assert call(channel, method, (*bearer("ops"), *bearer("ops"))).code() is UNAUTHENTICATED
        as_tenant, as_admin = (call(channel, method, bearer(name)) for name in ("alice", "ops"))
        if is_workers:
            assert {as_tenant.code(), as_admin.code()} == {DENIED}
        else:
            assert as_admin.code() is grpc.StatusCode.INVALID_ARGUMENT, "let through"
            is_denied = method.full_name in FOR_ADMINISTRATORS
            assert as_tenant.code() is (DENIED if is_denied else grpc.StatusCode.INVALID_ARGUMENT)


def test_what_is_open_and_what_does_not_exist(fleet: RunningFleet) -> None:
    stub: Any = health_pb2_grpc.HealthStub(fleet.channel)
    health = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert call(fleet.channel, "/splitfire.v1.Debug/Dump", ()).code() is UNAUTHENTICATED
    assert call(fleet.channel, "/splitfire.v1.Debug/Dump", bearer("alice")).code() is DENIED
    assert call(fleet.channel, "/splitfire.v1.Debug/Dump", bearer("ops")).code() is grpc.StatusCode.UNIMPLEMENTED
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(fleet.channel)
    for name, code in (("alice", DENIED), ("ops", grpc.StatusCode.UNIMPLEMENTED)):
        with pytest.raises(grpc.RpcError) as caught:
            list(
                reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()]), metadata=bearer(name), timeout=10)
            )
        assert caught.value.code() is code


@pytest.mark.parametrize(
    ("worker_id", "role", "code", "reason"),
    [
        ("", 1, grpc.StatusCode.INVALID_ARGUMENT, "invalid_worker_id"),
        ("a\nb", 1, grpc.StatusCode.INVALID_ARGUMENT, "invalid_worker_id"),
        ("x" * 129, 1, grpc.StatusCode.INVALID_ARGUMENT, "invalid_worker_id"),
        ("decode-0", 0, grpc.StatusCode.INVALID_ARGUMENT, "invalid_role"),
        ("decode-0", 3, grpc.StatusCode.INVALID_ARGUMENT, "invalid_role"),
        ("nobody", 1, grpc.StatusCode.NOT_FOUND, "no_worker"),
    ],
)
def test_a_role_that_cannot_be_changed_says_why(
    fleet: RunningFleet, worker_id: str, role: Any, code: grpc.StatusCode, reason: str
) -> None:
    stub = inference_pb2_grpc.AdminStub(fleet.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ChangeRole(pb.ChangeRoleRequest(worker_id=worker_id, role=role), metadata=bearer("ops"), timeout=10)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (code, reason)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "no_api_key"),
        ((("authorization", key("alice")),), "no_api_key"),
        ((("authorization", f"Basic {key('alice')}"),), "no_api_key"),
        ((*bearer("alice"), *bearer("bob")), "no_api_key"),
        ((("authorization", f"Bearer {key('alice')[:-1]}x"),), "unknown_api_key"),
        ((("authorization", "Bearer " + "x" * 7000),), "unknown_api_key"),
        (bearer("old"), "expired_api_key"),
        ((("tenant_id", "alice"),), "no_api_key"),
    ],
)
def test_a_wrong_credential_is_told_so_and_nothing_else(fleet: RunningFleet, metadata: Metadata, reason: str) -> None:
    """B39, B40, S10."""
    refusal = refused(fleet, greedy(), metadata)
    assert (refusal.code, refusal.reason, refusal.is_retryable) == (UNAUTHENTICATED, reason, False)
    assert "alice" not in refusal.message


@pytest.mark.parametrize("metadata", [tuple((f"k{i}", "v") for i in range(10_000)), (("big", "x" * 1_000_000),)])
def test_metadata_beyond_the_limit_ends_the_call(fleet: RunningFleet, metadata: Metadata) -> None:
    """B39."""
    assert refused(fleet, greedy(count=1), (*bearer("alice"), *metadata)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(generate(fleet, "alice", greedy(count=2)).ids) == 2


def test_a_class_is_never_above_the_tenants(fleet: RunningFleet) -> None:
    """B34."""
    for name, asked, given in (("bob", 4, 1), ("alice", 4, 3), ("ops", 3, 2)):
        request_id = secrets.token_hex(8)
        generate(fleet, name, greedy(count=2, request_id=request_id, priority=asked))
        lines = [line for line in (fleet.fleet.directory / "router.log").read_text().splitlines() if request_id in line]
        [lowered] = [line for line in lines if "priority lowered" in line]
        assert re.search(rf'"?given"?[=:] ?{given}\b', lowered), lowered


def test_no_tenant_finds_what_another_left_in_the_cache(fleet: RunningFleet) -> None:
    """B35, B52, P22: whatever a client says of itself."""
    request = greedy(range(400, 500), count=8)
    first = generate(fleet, "alice", request)
    again = generate(fleet, "alice", request)
    other = generate(fleet, "bob", request, ("tenant_id", "alice"), ("cache_salt", "alice"), ("x-tenant", "alice"))
    assert first.ids == again.ids == other.ids
    assert [a.summary.usage.cached_prompt_tokens for a in (first, again, other)] == [0, 96, 0]
    assert generate(fleet, "bob", request).summary.usage.cached_prompt_tokens == 96, "it has its own now"


def test_special_tokens_count_only_for_who_may_write_them(fleet: RunningFleet) -> None:
    """B09."""
    request = pb.TokenizeRequest(text="a<|endoftext|>b")
    counts = [len(fleet.stub.Tokenize(request, metadata=bearer(name), timeout=10).token_ids) for name in ("alice", "ops", "alice")]
    assert counts[0] == counts[2] > counts[1]


def test_an_id_belongs_to_the_tenant_that_uses_it(fleet: RunningFleet) -> None:
    """That a request is open is nobody else's to know."""
    stream = fleet.stub.Generate(lasting("mine"), metadata=bearer("alice"), timeout=30)
    next(stream)
    assert refused(fleet, greedy(count=1, request_id="mine"), bearer("alice")).code is grpc.StatusCode.ALREADY_EXISTS
    assert generate(fleet, "bob", greedy(count=1, request_id="mine")).ids
    stream.cancel()


def test_tokens_that_are_used_up_come_back_when_it_says(fleet: RunningFleet) -> None:
    generate(fleet, "small", greedy(PROMPT, count=57))  # 157 of 150: 7 are owed, and one is needed
    asked_at = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        generate(fleet, "small", greedy(PROMPT, count=1))
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "tenant_quota")
    assert refusal.is_retryable
    told = re.search(r"some in ([0-9.]+) s", refusal.message)
    assert told is not None
    told_s = float(told[1])
    assert 0 < told_s <= 8 * 60 / 150
    until(lambda: is_given(fleet, "small"), told_s + 5)
    assert time.monotonic() - asked_at > told_s - 0.05


def is_given(fleet: RunningFleet, name: str) -> bool:
    """Whether a request is let in now."""
    try:
        return bool(generate(fleet, name, greedy(PROMPT, count=1)).ids)
    except grpc.RpcError as exc:
        assert refusal_of(exc).reason == "tenant_quota"
        return False


def test_a_tenant_at_its_bound_holds_up_nobody_else(fleet: RunningFleet) -> None:
    stream = fleet.stub.Generate(LONG, metadata=bearer("narrow"), timeout=60)
    next(stream)
    refusal = refused(fleet, greedy(count=1), bearer("narrow"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "tenant_quota")
    assert generate(fleet, "alice", greedy(count=2)).ids
    stream.cancel()
    until(lambda: not num_open(fleet))
    assert generate(fleet, "narrow", greedy(count=2)).ids


def test_keys_change_while_a_stream_runs(fleet: RunningFleet, keys_file: Path) -> None:
    """SIGHUP: who was let in stays in, a file that cannot be read changes nothing."""
    router = fleet.process("router")
    stream = fleet.stub.Generate(LONG, metadata=bearer("bob"), timeout=60)
    next(stream)
    without_bob = TENANTS.replace("tenant.bob", "tenant.bobby").replace(hashlib.sha256(key("bob").encode()).hexdigest(), "0" * 64)
    try:
        keys_file.write_text(without_bob + table("carol"))
        router.send_signal(signal.SIGHUP)
        until(lambda: is_let_in(fleet, "carol"))
        assert not is_let_in(fleet, "bob")
        assert next(stream).token_ids, "its stream goes on"
        keys_file.write_text("[tenant.nobody")
        router.send_signal(signal.SIGHUP)
        log = fleet.fleet.directory / "router.log"
        until(lambda: "what was read before stays" in log.read_text())
        assert is_let_in(fleet, "carol")
    finally:
        keys_file.write_text(TENANTS)
        router.send_signal(signal.SIGHUP)
    until(lambda: is_let_in(fleet, "bob"))
    stream.cancel()


def is_let_in(fleet: RunningFleet, name: str) -> bool:
    try:
        return bool(fleet.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(name), timeout=10).models)
    except grpc.RpcError as exc:
        assert refusal_of(exc).code is UNAUTHENTICATED
        return False


def test_the_command_line_shows_a_key_from_a_file(fleet: RunningFleet, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(key("alice") + "\n")
    asked = ("generate", "import os", "--server", fleet.address, "--max-tokens=4")
    ran = splitfire(*asked, f"--api-key-file={path}")
    assert (ran.returncode, bool(ran.stdout.strip())) == (0, True)
    ran = splitfire(*asked)
    assert (ran.returncode, "no_api_key" in ran.stderr) == (1, True)
    ran = splitfire("fleet", "--server", fleet.address, f"--api-key-file={path}")
    assert (ran.returncode, "admin_only" in ran.stderr) == (1, True)


def test_a_new_key_and_its_line_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    make_key()
    make_key()
    secret, line, another, _ = capsys.readouterr().out.splitlines()
    assert line == f'keys = ["sha256:{hashlib.sha256(secret.encode()).hexdigest()}"]'
    assert len(secret) >= 40
    assert secret != another
