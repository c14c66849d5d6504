"""A worker's process once its settings hold: the only place where both ends of a hand-off are joined."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import NoReturn

import uvloop

from decode_svc.service import DecodeService
from kvtransfer.transport import Transport
from prefill_svc.service import PrefillService
from splitfire.core.process import end_now
from splitfire.core.settings import WorkerSettings
from splitfire.worker.loading import LoadedModel, load_model
from splitfire.worker.transports import open_transport
from splitfire.worker.worker import Worker

SWITCH_INTERVAL_S = 0.0005  # between the engine thread and the io thread; Python's default of 5 ms is a token


def run(settings: WorkerSettings) -> NoReturn:
    """Until drained, refused or crashed. ConfigError when it cannot start."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    transport = open_transport(settings)
    uvloop.run(_serve(settings, load_model(settings), transport))


async def _serve(settings: WorkerSettings, loaded: LoadedModel, transport: Transport) -> NoReturn:
    worker = Worker(settings, loaded, transport, lambda context: (PrefillService(context), DecodeService(context)))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.drain)
    end_now(await worker.run())  # here, where nothing of UCX has been let go of
