"""Under which circumstances a report was made: machine, commit, versions, the settings that a fleet of ours took from the environment."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from splitfire.core.settings import ENV_PREFIX, WorkerSettings

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("splitfire", "torch", "ucxx-cu12", "grpcio", "protobuf")
GIT_S = 10.0


def machine() -> str:
    """`AMD EPYC 9B14, 2 processors, 23 GiB, Linux 6.1`."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        memory = f", {int(Path('/proc/meminfo').read_text().split()[1]) >> 20} GiB"
    except (OSError, ValueError, IndexError):
        memory = ""
    count = len(os.sched_getaffinity(0))
    return f"{model}, {count} processor{'s' if count != 1 else ''}{memory}, Linux {platform.release().split('-')[0]}"


def commit() -> str:
    """`-dirty` when files differ from it; empty where this is no checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_S)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return said.stdout.strip()


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def worker_settings(environment: Mapping[str, str]) -> str:
    """What workers that are started here take from the environment; no names of files."""
    names = [ENV_PREFIX + name.upper() for name, field in WorkerSettings.model_fields.items() if field.annotation != Path | None]
    return ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
