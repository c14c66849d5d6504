"""OpenVINO GenAI: its continuous batching, behind `openvino_server.py`, on weights exported by optimum-intel as f16.

Half precision is what it stores; it computes in what INFERENCE_PRECISION_HINT says, by itself in f32 on a processor without
bf16 or f16 units and in bf16 on others. Its KV cache is u8 unless told otherwise. Both are left to it: that is its tuning.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.opponents.server import BUILD, Command, ServerPlan, installed_versions, quiet_port

PYTHON = BUILD / "openvino-venv" / "bin" / "python"
KV_GIB = 1


def why_not() -> str:
    """Why it cannot be measured here; empty when it can."""
    return "" if PYTHON.exists() else "OpenVINO GenAI is not installed: make bench-opponents"


def versions() -> dict[str, str]:
    return installed_versions(PYTHON, ("openvino-genai", "openvino", "optimum-intel"))


def server(name: str, checkpoint: Path, cpus: Sequence[int], flags: Sequence[str] = ()) -> ServerPlan:
    port = quiet_port()
    arguments = (
        str(PYTHON), "-P", str(Path(__file__).with_name("openvino_server.py")), str(exported(checkpoint)), f"--port={port}",
        f"--threads={len(cpus)}", f"--cache-gib={KV_GIB}", *flags,
    )  # fmt: skip
    return ServerPlan(name, (Command(arguments, {}, tuple(cpus)),), (port,), "")


def exported(checkpoint: Path) -> Path:
    """The checkpoint in OpenVINO's own format, made once (a minute) and again when the checkpoint is newer."""
    target = BUILD / "checkpoints" / f"{checkpoint.name}-openvino"
    model, source = target / "openvino_model.bin", checkpoint / "model.safetensors"
    if not model.exists() or model.stat().st_mtime < source.stat().st_mtime:
        command: list[str | Path] = [
            PYTHON.with_name("optimum-cli"), "export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past",
            "--weight-format", "fp16", target,
        ]  # fmt: skip
        log = BUILD / "logs" / "openvino-export.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            subprocess.run(command, stdout=file, stderr=file, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return target
