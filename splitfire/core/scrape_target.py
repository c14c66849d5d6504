"""Where Prometheus finds a metrics port that was drawn: a file in a directory that its file_sd watches, there while its process runs.

The process keeps its file locked. Whoever comes next takes away those that nobody has locked: their processes were killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from splitfire.core.errors import ConfigError


class ScrapeTarget:
    """One file, whole from the moment it has its name."""

    def __init__(self, directory: Path, host: str, port: int, labels: Mapping[str, str]) -> None:
        """ConfigError when it cannot be written. `labels` are those of every series that is scraped there."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        name = secrets.token_hex(8)
        new, self._path = directory / f".{name}.new", directory / f"{name}.json"
        try:
            remove_dead(directory)
            self._file = new.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            json.dump([{"targets": [address], "labels": dict(labels)}], self._file)
            self._file.flush()
            new.rename(self._path)
        except OSError as exc:
            raise ConfigError(f"metrics_targets {directory}: {exc.strerror or exc}") from exc

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._file.close()


def remove_dead(directory: Path) -> None:
    """Of processes that could not do it themselves."""
    for path in directory.glob("*.json"):
        with contextlib.suppress(OSError), path.open() as file:  # locked, or gone meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
