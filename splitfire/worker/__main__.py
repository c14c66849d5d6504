"""`python -m splitfire.worker`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from splitfire.core.errors import ConfigError
from splitfire.core.flags import exit_with, parse_settings
from splitfire.core.process import end_now, end_with_parent, require_environment
from splitfire.core.settings import WorkerSettings
from splitfire.core.telemetry import configure_logging


def main() -> NoReturn:
    try:
        end_with_parent()
        require_environment()
        settings = parse_settings(WorkerSettings, sys.argv[1:], prog="splitfire worker")
        configure_logging(settings.worker_id or settings.role, settings.log_level)
        if settings.cpu_numbers:
            pin(settings.cpu_numbers)
        from splitfire.worker.serve import run  # noqa: PLC0415 - torch takes two seconds; a wrong flag is told before

        run(settings)
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
