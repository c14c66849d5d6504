"""A small blocking gRPC client for the command line: the public API and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from splitfire.core.limits import MAX_MESSAGE_BYTES
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

CALL_TIMEOUT_S = 10.0


class ServerError(Exception):
    """What the server answered, as one line for a person."""


class Client:
    """One server. Use as a context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=(("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),))
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def generate(self, request: pb.GenerateRequest, timeout_s: float) -> Iterator[pb.GenerateResponse]:
        """Every message of the stream; ServerError when it ends badly. Leaving the iterator cancels the request."""
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc
        finally:
            call.cancel()

    def fleet(self, timeout_s: float = CALL_TIMEOUT_S, *, measure: bool = False) -> pb.GetFleetResponse:
        try:
            return self._stub.GetFleet(pb.GetFleetRequest(measure=measure), timeout=timeout_s)
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc

    def model(self) -> pb.Model:
        try:
            return self._stub.ListModels(pb.ListModelsRequest(), timeout=CALL_TIMEOUT_S).models[0]
        except grpc.RpcError as exc:
            raise ServerError(explain(exc, self.address)) from exc


def explain(error: grpc.RpcError, address: str) -> str:
    """The server's sentence and its stable reason; a hint when nobody answers."""
    call = cast(grpc.Call, error)  # what a stub raises is both
    status = rpc_status.from_call(call)
    reasons = []
    for detail in status.details if status is not None else ():
        info = ErrorInfo()
        if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info):
            reasons.append(info.reason)
    if not reasons and call.code() is grpc.StatusCode.UNAVAILABLE:
        return f"nobody answers on {address}; start a fleet with `splitfire up`, or name another with --server"
    return f"{call.details()} ({', '.join([call.code().name, *reasons])})"
