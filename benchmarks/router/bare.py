"""`python -m benchmarks.router.bare PORT WORKER_PORT [STEP_S]`: relays between clients and fake workers, and does nothing else.

It reads and writes the messages that the router does, over the same gRPC, and neither checks, tokenizes, places, counts nor
recovers. What it costs is the floor under the router; the difference is the router's own. With STEP_S it is no relay either but
answers by itself, the first token at once and each further one after that time: what a client would see without any router.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

import grpc
import uvloop
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from splitfire.core.fingerprint import PROTOCOL_MAJOR
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc
from splitfire.v1 import inference_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]
SUMMARY = pb.GenerateResponse(summary=pb.Summary(request_id="0123456789abcdef"))


class Stream:
    """One request: what has come, and whether more will."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.is_over = False
        self.changed = asyncio.Event()


class Bare(fleet_pb2_grpc.FleetServicer):
    """Both services. The first prefill worker and the first decode worker get everything."""

    def __init__(self, step_s: float | None) -> None:
        self._step_s = step_s
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._outboxes: dict[int, asyncio.Queue[fleet_pb2.AttachResponse]] = {}

    async def Attach(self, _requests: object, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        hello = (await context.read()).hello
        outbox: asyncio.Queue[fleet_pb2.AttachResponse] = asyncio.Queue(10_000)
        version = fleet_pb2.ProtocolVersion(major=PROTOCOL_MAJOR)
        outbox.put_nowait(fleet_pb2.AttachResponse(welcome=fleet_pb2.Welcome(router_id="bare", version=version)))
        self._outboxes[hello.role] = outbox
        writer = asyncio.create_task(self._write(outbox, context))
        try:
            while isinstance(frame := await context.read(), fleet_pb2.AttachRequest):
                for output in frame.step_output.sequences:
                    self._take(output)
                if frame.finished.reason:
                    stream = self._streams[frame.finished.attempt]
                    stream.is_over = True
                    stream.changed.set()
        finally:
            writer.cancel()

    async def Report(self, _requests: object, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        while isinstance(await context.read(), fleet_pb2.ReportRequest):
            pass

    async def generate(self, request: pb.GenerateRequest, context: Context) -> None:
        if self._step_s is not None:
            await self._answer(request, context, self._step_s)
            return
        number = next(self._numbers)
        stream = self._streams[number] = Stream()
        self._submit(number, request)
        num_sent = 0
        while not stream.is_over or num_sent < len(stream.ids):
            if num_sent == len(stream.ids):
                await stream.changed.wait()
                stream.changed.clear()
                continue
            fresh = stream.ids[num_sent:]
            num_sent += len(fresh)
            await context.write(pb.GenerateResponse(token_ids=fresh, text="12345678"))
        await context.write(SUMMARY)
        del self._streams[number]

    async def _answer(self, request: pb.GenerateRequest, context: Context, step_s: float) -> None:
        for i in range(request.stopping.max_tokens):
            await asyncio.sleep(step_s if i else 0.0)
            await context.write(pb.GenerateResponse(token_ids=[i], text="12345678"))
        await context.write(SUMMARY)

    def _take(self, output: fleet_pb2.SequenceOutput) -> None:
        stream = self._streams.get(output.attempt)
        if stream is not None:
            stream.ids += output.token_ids[len(stream.ids) - output.offset :]
            stream.changed.set()

    def _submit(self, number: int, request: pb.GenerateRequest) -> None:
        max_tokens = request.stopping.max_tokens
        submit = fleet_pb2.Submit(
            attempt=number, part=fleet_pb2.PART_PREFILL, prompt_token_ids=request.prompt_token_ids or range(75),
            stopping=fleet_pb2.ResolvedStopping(max_tokens=max_tokens),
        )  # fmt: skip
        if max_tokens > 1:
            submit.handoff.transfer_id = number.to_bytes(16, "little")
        self._outboxes[pb.ROLE_PREFILL].put_nowait(fleet_pb2.AttachResponse(submit=submit))
        if max_tokens > 1:
            submit.part = fleet_pb2.PART_DECODE
            self._outboxes[pb.ROLE_DECODE].put_nowait(fleet_pb2.AttachResponse(submit=submit))

    async def _write(self, outbox: asyncio.Queue[fleet_pb2.AttachResponse], context: Context) -> None:
        while True:
            await context.write(await outbox.get())


async def serve(port: int, worker_port: int, step_s: float | None) -> None:
    bare = Bare(step_s)
    public, private = grpc.aio.server(), grpc.aio.server()
    generate = grpc.unary_stream_rpc_method_handler(
        bare.generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    public.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("splitfire.v1.Inference", {"Generate": generate}),))
    fleet_pb2_grpc.add_FleetServicer_to_server(bare, private)
    add_HealthServicer_to_server(HealthServicer(), public)
    public.add_insecure_port(f"127.0.0.1:{port}")
    private.add_insecure_port(f"127.0.0.1:{worker_port}")
    await private.start()
    await public.start()
    await public.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else None))
