"""Orders to another process over a pipe, one at a time: a method's name and arguments there, what it returns back, or what went wrong."""

from __future__ import annotations

import asyncio
import inspect
from multiprocessing.connection import Connection
from typing import Any


class Orders:
    """The end that gives them."""

    def __init__(self, name: str, connection: Connection, within_s: float) -> None:
        """within_s: no single order takes as long."""
        self._name = name
        self._connection = connection
        self._within_s = within_s

    def begin(self, order: str, *args: object) -> None:
        self._connection.send((order, args))

    def result(self, within_s: float | None = None) -> Any:
        """TimeoutError, RuntimeError with what went wrong, EOFError or ConnectionResetError when the process is gone."""
        limit = self._within_s if within_s is None else within_s
        if not self._connection.poll(limit):
            raise TimeoutError(f"{self._name} did not answer within {limit:g} s")
        answer, error = self._connection.recv()
        if error:
            raise RuntimeError(f"{self._name}: {error}")
        return answer

    def do(self, order: str, *args: object) -> Any:
        self.begin(order, *args)
        return self.result()

    def close(self) -> None:
        self._connection.close()


async def obey(connection: Connection, node: object) -> None:
    """The end that obeys, with methods of `node`, which may be coroutines. EOFError when nobody gives orders any more."""
    has_order = asyncio.Event()
    asyncio.get_running_loop().add_reader(connection.fileno(), has_order.set)
    while True:
        await has_order.wait()
        has_order.clear()
        while connection.poll():
            order, args = connection.recv()
            try:
                answer = getattr(node, order)(*args)
                connection.send((await answer if inspect.isawaitable(answer) else answer, ""))
            except Exception as exc:
                connection.send((None, f"{order}: {type(exc).__name__}: {exc}"))
