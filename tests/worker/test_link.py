"""A worker's link to a router survives whatever the router does to its two streams. Real gRPC, a router of a few lines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc
import pytest

from splitfire.core.errors import Mismatch
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc
from splitfire.worker.link import LinkOptions, Reports, RouterLink
from tests.rig import until

End = Callable[[Any], Awaitable[None]]


class Router(fleet_pb2_grpc.FleetServicer):
    """Welcomes everybody; `end_attach` and `end_report` do what a test wants once a stream stands."""

    def __init__(self, end_attach: End, end_report: End) -> None:
        self.num_attached = 0
        self._end_attach, self._end_report = end_attach, end_report

    async def Attach(self, requests: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await context.read()
        self.num_attached += 1
        await context.write(fleet_pb2.AttachResponse(welcome=fleet_pb2.Welcome(router_id="r")))
        await self._end_attach(context)

    async def Report(self, requests: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        await self._end_report(context)


class Side:
    """A worker that only counts."""

    def __init__(self) -> None:
        self.num_lost = 0
        self.num_resyncs = 0

    def hello(self) -> fleet_pb2.Hello:
        return fleet_pb2.Hello(worker_id="w")

    def on_frame(self, link: RouterLink, frame: fleet_pb2.AttachResponse) -> None: ...

    def on_attached(self, link: RouterLink) -> None: ...

    def on_lost(self, link: RouterLink) -> None:
        self.num_lost += 1

    def reports(self, link: RouterLink) -> AbstractContextManager[Reports]:
        return nullcontext(self)

    async def messages(self) -> AsyncIterator[fleet_pb2.ReportRequest]:
        while True:
            yield fleet_pb2.ReportRequest(incarnation=b"i" * 16)
            await asyncio.sleep(0.005)

    def resync(self) -> None:
        self.num_resyncs += 1


async def never(_context: Any) -> None:
    await asyncio.sleep(3600)


async def at_once(_context: Any) -> None:
    return


async def with_an_error(context: Any) -> None:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "stale incarnation")


async def with_a_bug(_context: Any) -> None:
    raise ZeroDivisionError


async def after_some_tokens(_context: Any) -> None:
    await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("end_attach", "end_report"),
    [
        (never, at_once),
        (never, with_an_error),
        (never, with_a_bug),
        (at_once, never),
        (with_a_bug, never),
        (after_some_tokens, never),
    ],
)
def test_a_stream_that_the_router_ends_is_dialled_again(end_attach: End, end_report: End) -> None:
    async def scene() -> None:
        router, side = Router(end_attach, end_report), Side()
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        refused: list[Mismatch] = []
        link = RouterLink(LinkOptions(f"127.0.0.1:{port}"), side, refused.append)
        task = asyncio.create_task(link.run())
        for i in range(2000):
            if router.num_attached >= 4:
                break
            assert not task.done(), task
            link.output(fleet_pb2.SequenceOutput(attempt=1, offset=i, token_ids=[7]))
            await asyncio.sleep(0.005)
        assert router.num_attached >= 4
        assert side.num_lost >= 3
        assert not refused
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)

    asyncio.run(scene())


def test_a_router_that_lost_count_of_cache_events_says_so_on_the_stream_they_came_on() -> None:
    async def says_so(context: Any) -> None:
        for resync in (True, False, True):
            await context.read()
            await context.write(fleet_pb2.ReportResponse(resync=resync))
        await never(context)

    async def scene() -> None:
        side = Side()
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServicer_to_server(Router(never, says_so), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        task = asyncio.create_task(RouterLink(LinkOptions(f"127.0.0.1:{port}"), side, lambda _error: None).run())
        await until(lambda: side.num_resyncs == 2, 20)
        assert side.num_lost == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("link-")]
        await server.stop(0)

    asyncio.run(scene())


def test_what_was_not_sent_yet_is_merged_and_drafts_are_added_up() -> None:
    link = RouterLink(LinkOptions("nowhere:1"), Side(), lambda _error: None)
    link.output(fleet_pb2.SequenceOutput(attempt=1, offset=0, token_ids=[7, 8], draft_tokens=3, accepted_offsets=[1]))
    link.output(fleet_pb2.SequenceOutput(attempt=1, offset=1, token_ids=[8, 9], draft_tokens=2, accepted_offsets=[2]))
    [unsent] = link._outputs.values()
    assert list(unsent.token_ids) == [7, 8, 9]
    assert (unsent.draft_tokens, list(unsent.accepted_offsets)) == (5, [1, 2])


def test_a_router_that_does_not_want_the_worker_any_more_is_final() -> None:
    async def scene() -> None:
        router, side = Router(with_an_error, never), Side()
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        refused: list[Mismatch] = []
        async with asyncio.timeout(20):
            await RouterLink(LinkOptions(f"127.0.0.1:{port}"), side, refused.append).run()
        assert [str(error) for error in refused] == ["stale incarnation"]
        await server.stop(0)

    asyncio.run(scene())
