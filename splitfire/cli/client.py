"""A small blocking gRPC client for the command line: the public API and nothing else."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from splitfire.core.limits import MAX_MESSAGE_BYTES
from splitfire.core.secret_files import read_secret
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

CALL_TIMEOUT_S = 10.0
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),  # who starts a fleet asks before it is there
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class ServerError(Exception):
    """What the server answered, as one line for a person."""


class Client:
    """One server. Use as a context manager. `authority` (PEM) is who its certificate must come from; None: in clear text."""

    def __init__(self, address: str, api_key: bytes | None = None, authority: bytes | None = None) -> None:
        self.address = address
        self._metadata = (("authorization", f"Bearer {api_key.decode()}"),) if api_key is not None else ()
        if authority is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority), options=OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def generate(self, request: pb.GenerateRequest, timeout_s: float) -> Generator[pb.GenerateResponse, None, None]:
        """Every message of the stream; ServerError when it ends badly. Leaving the iterator cancels the request."""
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc
        finally:
            call.cancel()

    def fleet(self, timeout_s: float = CALL_TIMEOUT_S, *, measure: bool = False, last: int = 0) -> pb.GetFleetResponse:
        """`last`: with so many of the latest placements."""
        try:
            return self._stub.GetFleet(pb.GetFleetRequest(measure=measure, last=last), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc

    def traces(self, *, name: str = "", last: int = 0, slowest: int = 0) -> list[pb.RequestTrace]:
        """What the router process that answers remembers."""
        asked = pb.GetTracesRequest(id=name, last=last, slowest=slowest)
        try:
            return list(self._stub.GetTraces(asked, timeout=CALL_TIMEOUT_S, metadata=self._metadata).traces)
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc

    def change_role(self, worker_id: str, role: pb.Role.ValueType) -> None:
        """Returns when the worker was told to."""
        admin = inference_pb2_grpc.AdminStub(self._channel)
        try:
            admin.ChangeRole(pb.ChangeRoleRequest(worker_id=worker_id, role=role), timeout=CALL_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc

    def model(self) -> pb.Model:
        try:
            return self._stub.ListModels(pb.ListModelsRequest(), timeout=CALL_TIMEOUT_S, metadata=self._metadata).models[0]
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc


def connect(address: str, api_key_file: Path | None = None, tls_ca: Path | None = None) -> Client:
    """With what the command line names. ConfigError when a file cannot be used."""
    authority = None
    if tls_ca is not None:
        from splitfire.core.tls import read_authority  # noqa: PLC0415 - 160 ms, only if used

        authority = read_authority(tls_ca)
    return Client(address, read_secret(api_key_file) if api_key_file is not None else None, authority)


def explain(error: grpc.RpcError, address: str) -> str:
    """The server's sentence and its stable reason; a hint when nobody answers."""
    call = cast(grpc.Call, error)  # what a stub raises is both
    reasons = reasons_of(error)
    details = call.details() or ""
    if not reasons and any(word in details.lower() for word in ("handshake", "verification")):
        return f"{address} does not prove who it is: {details}; --tls-ca names who must have signed its certificate"
    if not reasons and call.code() is grpc.StatusCode.UNAVAILABLE:
        return f"nobody answers on {address}; start a fleet with `splitfire up`, or name another with --server"
    return f"{details} ({', '.join([call.code().name, *reasons])})"


def reasons_of(error: grpc.RpcError) -> list[str]:
    """The stable reasons of a server of ours; empty when the error is another's, or the connection's."""
    status = rpc_status.from_call(cast(grpc.Call, error))
    reasons = []
    for detail in status.details if status is not None else ():
        info = ErrorInfo()
        if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info):
            reasons.append(info.reason)
    return reasons
