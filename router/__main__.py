"""`python -m router`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import NoReturn

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # read when grpc is loaded; the text pool's processes do not use grpc

import uvloop

from router.server import RouterServer
from splitfire.core.errors import ConfigError
from splitfire.core.flags import exit_with, parse_settings
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model
from splitfire.core.process import end_now, end_with_parent, require_environment
from splitfire.core.settings import RouterSettings
from splitfire.core.telemetry import configure_logging


async def serve(settings: RouterSettings, model: ModelDir) -> NoReturn:
    server = RouterServer(settings, model)
    await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.drain)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    end_now(await server.run())


def main() -> NoReturn:
    try:
        end_with_parent()
        require_environment()
        settings = parse_settings(RouterSettings, sys.argv[1:], prog="splitfire router")
        configure_logging("router", settings.log_level)
        uvloop.run(serve(settings, ModelDir(resolve_model(settings.model))))
    except ConfigError as exc:
        end_now(exit_with(exc))


if __name__ == "__main__":
    main()
