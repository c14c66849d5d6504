"""`python -m splitfire.worker`: the only place where both ends of a hand-off are joined."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import NoReturn

import uvloop

from decode_svc.service import DecodeService
from kvtransfer.transport import Transport
from prefill_svc.service import PrefillService
from splitfire.core.errors import ConfigError
from splitfire.core.flags import exit_with, parse_settings
from splitfire.core.process import end_now, end_with_parent, require_environment
from splitfire.core.settings import WorkerSettings
from splitfire.core.telemetry import configure_logging
from splitfire.worker.loading import LoadedModel, load_model
from splitfire.worker.transports import open_transport
from splitfire.worker.worker import Worker

SWITCH_INTERVAL_S = 0.0005  # between the engine thread and the io thread; Python's default of 5 ms is a token


async def serve(settings: WorkerSettings, loaded: LoadedModel, transport: Transport) -> NoReturn:
    worker = Worker(settings, loaded, transport, lambda context: (PrefillService(context), DecodeService(context)))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.drain)
    end_now(await worker.run())  # here, where nothing of UCX has been let go of


def main() -> NoReturn:
    try:
        end_with_parent()
        require_environment()
        settings = parse_settings(WorkerSettings, sys.argv[1:], prog="splitfire worker")
        configure_logging(settings.worker_id or settings.role, settings.log_level)
        if settings.cpu_numbers:
            pin(settings.cpu_numbers)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        transport = open_transport(settings)
        uvloop.run(serve(settings, load_model(settings), transport))
    except ConfigError as exc:
        end_now(exit_with(exc))


def pin(cpus: tuple[int, ...]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as exc:
        existing = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
        raise ConfigError(f"cpus: {','.join(map(str, cpus))} cannot be used, this process may run on {existing}") from exc


if __name__ == "__main__":
    main()
