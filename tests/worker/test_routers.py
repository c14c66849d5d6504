"""Routers come and go by name, and no trouble of a name server costs a link that works."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence

import pytest

from splitfire.core import limits
from splitfire.worker import routers
from splitfire.worker.link import LinkOptions
from splitfire.worker.routers import Routers, resolve
from tests.rig import until


class FakeLink:
    """Runs until it is cancelled. Attached when the test says so."""

    def __init__(self, address: str) -> None:
        self.options = LinkOptions(address)
        self.is_attached = False
        self.router_id = ""
        self.is_over = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.is_over = True


class Bench:
    """Names and what they resolve to; an exception instead of addresses is raised."""

    def __init__(self, **names: Sequence[str] | Exception) -> None:
        self.names: dict[str, Sequence[str] | Exception] = dict(names)
        self.made: list[FakeLink] = []
        self.num_looks = 0
        self.routers = Routers(list(names), self._make, self._resolve)  # type: ignore[arg-type]

    def _make(self, address: str) -> FakeLink:
        self.made.append(FakeLink(address))
        return self.made[-1]

    async def _resolve(self, name: str) -> Sequence[str]:
        self.num_looks += name == next(iter(self.names))
        found = self.names[name]
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def addresses(self) -> list[str]:
        return [link.options.address for link in self.routers]

    def link(self, address: str) -> FakeLink:
        return next(link for link in self.made if link.options.address == address and not link.is_over)

    def attach(self, address: str, router_id: str = "") -> FakeLink:
        link = self.link(address)
        link.is_attached, link.router_id = True, router_id or address
        self.routers.attached(link)  # type: ignore[arg-type]
        return link

    async def look(self) -> None:
        seen = self.num_looks
        await until(lambda: self.num_looks >= seen + 2)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "RESOLVE_EVERY_S", 0.002)
    monkeypatch.setattr(routers, "RESOLVE_FIRST_S", 0.002)


def play(scene: Callable[[Bench], Coroutine[object, object, None]], bench: Bench) -> None:
    async def whole() -> None:
        running = asyncio.create_task(bench.routers.run())
        await bench.look()
        await scene(bench)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert all(link.is_over for link in bench.made)

    asyncio.run(asyncio.wait_for(whole(), 30))


def test_every_address_of_every_name_gets_one_link_and_new_ones_too() -> None:
    async def scene(bench: Bench) -> None:
        assert bench.addresses == ["1:1", "2:1", "3:1"]
        bench.names["b"] = ["2:1", "3:1", "4:1"]
        await bench.look()
        assert bench.addresses == ["1:1", "2:1", "3:1", "4:1"]
        assert len(bench.made) == 4

    play(scene, Bench(a=["1:1", "2:1"], b=["2:1", "3:1"]))


def test_a_name_that_does_not_exist_yet_is_asked_for_again() -> None:
    """F73: the worker is there before its router."""

    async def scene(bench: Bench) -> None:
        assert bench.addresses == []
        bench.names["a"] = ["1:1"]
        await bench.look()
        assert bench.addresses == ["1:1"]

    play(scene, Bench(a=socket.gaierror("unknown")))


@pytest.mark.parametrize("trouble", [socket.gaierror("away"), TimeoutError(), []])
def test_dns_flap(trouble: Exception | list[str]) -> None:
    """F70: the last good addresses are kept, attached or not."""

    async def scene(bench: Bench) -> None:
        bench.attach("1:1")
        for _ in range(3):
            bench.names["a"] = trouble
            await bench.look()
            assert bench.addresses == ["1:1", "2:1"]
            bench.names["a"] = ["1:1", "2:1"]
            await bench.look()
        assert len(bench.made) == 2

    play(scene, Bench(a=["1:1", "2:1"]))


def test_an_address_that_a_name_has_lost_is_kept_while_it_works() -> None:
    async def scene(bench: Bench) -> None:
        works = bench.attach("1:1")
        bench.names["a"] = ["3:1"]
        await bench.look()
        assert bench.addresses == ["1:1", "3:1"]
        works.is_attached = False
        await bench.look()
        await until(lambda: works.is_over)
        assert bench.addresses == ["3:1"]

    play(scene, Bench(a=["1:1", "2:1"]))


def test_two_addresses_of_one_process_do_not_cut_each_other_off_for_ever() -> None:
    async def scene(bench: Bench) -> None:
        first, second = bench.attach("1:1", "r"), bench.attach("2:1", "r")
        await until(lambda: first.is_over)
        await bench.look()
        assert bench.addresses == ["2:1"]
        second.is_attached = False  # the process is gone
        bench.names["a"] = ["1:1"]
        await bench.look()
        await until(lambda: second.is_over)
        await bench.look()
        assert bench.addresses == ["1:1"], "it may be another one now"

    play(scene, Bench(a=["1:1", "2:1"]))


def test_links_are_bounded() -> None:
    async def scene(bench: Bench) -> None:
        assert len(bench.addresses) == limits.MAX_ROUTERS
        bench.names["a"] = [f"{i}:2" for i in range(limits.MAX_ROUTERS)]
        await bench.look()
        await bench.look()
        assert len(bench.addresses) == limits.MAX_ROUTERS
        assert set(bench.addresses) == set(bench.names["a"])  # type: ignore[arg-type]

    play(scene, Bench(a=[f"{i}:1" for i in range(limits.MAX_ROUTERS + 1)]))


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("router:7071", [(socket.AF_INET, "10.0.0.1"), (socket.AF_INET, "10.0.0.2")], ["10.0.0.1:7071", "10.0.0.2:7071"]),
        ("router:7071", [(socket.AF_INET6, "fd00::1"), (socket.AF_INET, "10.0.0.1")], ["10.0.0.1:7071"]),
        ("[fd00::1]:7071", [(socket.AF_INET6, "fd00::1")], ["[fd00::1]:7071"]),
    ],
)
def test_a_host_of_two_families_is_one(
    name: str, found: list[tuple[int, str]], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
            assert (host, port) == (name.rpartition(":")[0].strip("[]"), 7071)
            return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in found]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        assert await resolve(name) == expected

    asyncio.run(scene())
