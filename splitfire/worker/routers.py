"""Every router process that the settings name: a link to each address a name has, now and later. io thread.

Names are resolved again and again. A new address gets a link. One that a name has lost keeps its link while that is attached: a name
server that is away, or wrong for a moment, costs nothing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias

import structlog

from splitfire.core import limits
from splitfire.worker.link import RouterLink

log = structlog.get_logger("worker")
RESOLVE_EVERY_S, RESOLVE_FIRST_S = 10.0, 1.0  # once there is an address; until there is one
RESOLVE_TIMEOUT_S = 5.0
Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]


async def resolve(name: str) -> Sequence[str]:
    """The addresses of `host:port`; of one family, so that a host that has both is not two. OSError when there is none."""
    host, _, port = name.rpartition(":")
    async with asyncio.timeout(RESOLVE_TIMEOUT_S):
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    family = min(entry[0] for entry in found)  # IPv4 before IPv6
    hosts = [str(entry[4][0]) for entry in found if entry[0] == family]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in dict.fromkeys(hosts)]


class Routers:
    """At most MAX_ROUTERS links. Two addresses of one router process are one link: it would take either for the end of the other."""

    def __init__(self, names: Sequence[str], make_link: Callable[[str], RouterLink], resolve: Resolve = resolve) -> None:
        self._names = names
        self._make_link = make_link
        self._resolve = resolve
        self._links: dict[str, RouterLink] = {}  # by address
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, Sequence[str]] = {}  # addresses of a name, when last it could be resolved
        self._twins: dict[str, str] = {}  # an address of a process, and that of the link to it

    def __iter__(self) -> Iterator[RouterLink]:
        return iter(list(self._links.values()))

    @property
    def is_attached(self) -> bool:
        return any(link.is_attached for link in self)

    async def run(self) -> None:
        """Until cancelled, or a link fails with a bug."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._look(group)
                await asyncio.sleep(RESOLVE_EVERY_S if self._links else RESOLVE_FIRST_S)

    async def flush(self) -> None:
        await asyncio.gather(*(link.flush() for link in self))

    def attach_again(self) -> None:
        """Says hello anew everywhere."""
        for link in self:
            link.attach_again()

    def attached(self, link: RouterLink) -> None:
        """A router welcomed the link. Another that leads to the same process has just been cut off by it, and is given up."""
        for address, other in list(self._links.items()):
            if other is not link and other.router_id == link.router_id:
                log.info("one router, two addresses", router_id=link.router_id, kept=link.options.address, given_up=address)
                self._twins[address] = link.options.address
                self._give_up(address)

    async def _look(self, group: asyncio.TaskGroup) -> None:
        for name, addresses in zip(self._names, await asyncio.gather(*map(self._addresses, self._names)), strict=True):
            self._known[name] = addresses
        wanted = list(dict.fromkeys(address for addresses in self._known.values() for address in addresses))
        for address in [a for a, link in self._links.items() if a not in wanted and not link.is_attached]:
            self._give_up(address)
        self._twins = {address: twin for address, twin in self._twins.items() if twin in self._links and address in wanted}
        for address in wanted:
            if address not in self._links and address not in self._twins and len(self._links) < limits.MAX_ROUTERS:
                link = self._links[address] = self._make_link(address)
                self._tasks[address] = group.create_task(link.run(), name=f"link-{address}")

    async def _addresses(self, name: str) -> Sequence[str]:
        try:
            return await self._resolve(name) or self._known.get(name, ())
        except (OSError, TimeoutError) as exc:
            known = self._known.get(name, ())
            log.warning("name not resolved", name=name, detail=str(exc) or "no answer in time", kept=list(known))
            return known

    def _give_up(self, address: str) -> None:
        del self._links[address]
        self._tasks.pop(address).cancel()
