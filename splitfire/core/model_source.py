"""MODEL as people write it (`pico`, a directory, a hub id) as a local directory."""

from __future__ import annotations

import os
from pathlib import Path

from splitfire.core.errors import ModelError

BUILT_IN = Path(__file__).resolve().parents[2] / "models"
BUILT_IN_MODELS = ("pico", "pico-draft")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]  # never code, never pickles


def resolve_model(model: str) -> Path:
    """A directory that exists; downloads from the hub when `model` is a hub id that is not here yet. Blocking."""
    if model in BUILT_IN_MODELS:
        path = BUILT_IN / model
        if not path.is_dir():
            raise ModelError(f"{model}: the built-in model is not in {path}; run from a checkout, or give a model directory")
        return path
    return _download(model) if is_hub_id(model) else Path(model).expanduser()


def served_name(model: str, path: Path) -> str:
    """What clients call it: the hub id as it was given, otherwise the directory's own name."""
    return model if is_hub_id(model) else path.resolve().name


def is_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - 0.3 s, and only for hub ids
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        reason = str(exc).splitlines()[0][:160]
        raise ModelError(f"{model}: is neither a directory here nor to be had from the hub: {reason}") from exc
