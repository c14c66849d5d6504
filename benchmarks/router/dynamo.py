"""Dynamo's KV router in front of fake engines of its own, as processes that are told what to do in lines of JSON.

The router's process is also the clients': Dynamo's router is a library, and its HTTP front end is left out, to its advantage.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.opponents.server import BUILD, LOGS, installed_versions
from benchmarks.router.engine import Speed
from benchmarks.router.rig import OTHER_CORE, ROOT, ROUTER_CORE, bench_model

PYTHON = BUILD / "dynamo-venv" / "bin" / "python"
DYNAMO = "dynamo KV router"


class DynamoFailed(Exception):
    """It did not answer; its log says why."""


def why_not() -> str:
    return "" if PYTHON.exists() else "not installed: benchmarks/router/setup"


def versions() -> dict[str, str]:
    return installed_versions(PYTHON, ("ai-dynamo-runtime",)) if not why_not() else {}


def play(
    speed: Speed, block_size: int, num_engines: int, prompts: Sequence[tuple[float, Sequence[int], int]]
) -> tuple[list[float], float]:
    """Times to first token, and the hit rate; `prompts` are instant, token ids and how many to make."""
    if reason := why_not():
        raise DynamoFailed(reason)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        asked = ["engine", str(bench_model()), asdict(speed), block_size]
        engines = [stack.enter_context(_process(asked, OTHER_CORE, store, f"engine-{i}")) for i in range(num_engines)]
        for engine in engines:
            _read(engine)
        routing = stack.enter_context(_process(["router", num_engines, block_size], ROUTER_CORE, store, "router"))
        _write(routing, json.dumps(prompts) + "\n")
        ttft_s = _read(routing)["ttft_s"]
        found = []
        for engine in engines:
            assert engine.stdin is not None
            engine.stdin.close()
            found.append(_read(engine))
    return ttft_s, sum(f["cached_tokens"] for f in found) / sum(f["prompt_tokens"] for f in found)


@contextlib.contextmanager
def _process(asked: list[Any], core: int, store: str, name: str) -> Iterator[subprocess.Popen[str]]:
    LOGS.mkdir(parents=True, exist_ok=True)
    command = ("taskset", "-c", str(core), str(PYTHON), "-m", "benchmarks.router.dynamo_node", json.dumps(asked))
    environment = {**os.environ, "DYN_FILE_KV": store, "DYN_LOG": "warn", "PYTHONPATH": str(ROOT)}
    with (LOGS / f"dynamo-{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that is ours; Dynamo's own log may stand between."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    raise DynamoFailed(f"ended without an answer ({LOGS.relative_to(ROOT)}/dynamo-*.log)")
