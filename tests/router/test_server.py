"""The router's process, where no request can see it."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest

from router import server
from router.server import RouterServer
from splitfire.core.flags import parse_settings
from splitfire.core.model_dir import ModelDir
from splitfire.core.settings import RouterSettings
from tests.checkpoints import PICO

FLAGS = [f"--model={PICO}", "--port=0", "--worker-port=0"]


def test_a_router_that_lost_its_clock_to_a_bug_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who went silent would stay in the fleet, and a drain would last its whole grace time."""

    class Broken(RouterServer):
        async def _tick(self) -> None:
            raise ZeroDivisionError

    async def run() -> int:
        router = Broken(parse_settings(RouterSettings, FLAGS, prog="router"), ModelDir(PICO))
        async with asyncio.timeout(60.0):
            await router.start()
            return await router.run()

    monkeypatch.setattr(server, "end_soon", lambda: None)  # pytest goes on
    monkeypatch.setattr(server, "gc", Mock())
    assert asyncio.run(run()) == 1
