"""Group E of bad inputs: a wrong setting is one line that names it, its value and what is accepted; exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitfire.core.errors import ConfigError
from splitfire.core.settings import (
    RouterSettings,
    WorkerSettings,
    describe,
    parse_addresses,
    parse_bytes,
    parse_cpus,
    parse_settings,
    read_secret,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("SPLITFIRE_")]:
        monkeypatch.delenv(name)


def worker(*flags: str) -> WorkerSettings:
    return parse_settings(WorkerSettings, flags, prog="worker")


def refusal(kind: type[WorkerSettings] | type[RouterSettings], *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_settings(kind, flags, prog="test")
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_flags_and_environment_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker("--kv-memory=1GiB").kv_memory == 1 << 30
    monkeypatch.setenv("SPLITFIRE_KV_MEMORY", "512MiB")
    assert worker().kv_memory == 512 << 20
    assert worker("--kv-memory", "2GiB").kv_memory == 2 << 30, "a flag wins (B109)"
    monkeypatch.setenv("SPLITFIRE_KV_MEMORY", "")
    assert worker().kv_memory is None, "an empty variable counts as unset (B109)"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--blok-size=16"], "did you mean --block-size?"),  # B106
        (["--block-size=33"], "a power of two"),  # B108
        (["--block-size=0"], "block_size"),
        (["--block-size=-4"], "block_size"),
        (["--block-size=big"], "block_size"),
        (["--kv-memory=10GB"], "KiB, MiB or GiB"),  # B107
        (["--kv-memory=10Gi"], "KiB, MiB or GiB"),
        (["--kv-memory=1e999"], "KiB, MiB or GiB"),
        (["--kv-memory=-5MiB"], "KiB, MiB or GiB"),
        (["--kv-memory=1"], "kv_memory"),
        (["--max-running=nan"], "max_running"),
        (["--role=both"], "role"),
        (["--router=nowhere"], "host:port"),
        (["--router=h:99999"], "host:port"),
        (["--cpus=a-b"], "processor numbers"),
        (["--chunk-tokens=16", "--block-size=32"], "chunk_tokens is 16, less than block_size = 32"),  # B108: both names
        (["--role=prefill", "--drain-grace-s=5"], "hold deadline"),
        (["--log-level=loud"], "log_level"),
    ],
)
def test_a_wrong_worker_setting_is_named(flags: list[str], says: str) -> None:
    assert says in refusal(WorkerSettings, *flags)


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITFIRE_BLOK_SIZE", "16")
    assert "did you mean SPLITFIRE_BLOCK_SIZE?" in refusal(WorkerSettings)


@pytest.mark.parametrize("flags", [["--host=0.0.0.0"], ["--worker-host=0.0.0.0"], ["--host=::"]])
def test_an_address_others_can_reach_needs_consent(flags: list[str]) -> None:
    """B112."""
    assert "--insecure" in refusal(RouterSettings, *flags)
    assert parse_settings(RouterSettings, [*flags, "--insecure"], prog="router").insecure


def test_values_for_people() -> None:
    assert parse_bytes("3MiB") == 3 << 20
    assert parse_bytes("17") == 17
    assert parse_cpus("0,2-4,2") == (0, 2, 3, 4)
    assert parse_cpus("") == ()
    assert parse_addresses("a:1, b:2") == ("a:1", "b:2")


def test_secret_files(tmp_path: Path) -> None:
    """B111."""
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(path)
    path.write_text("s" * 32 + "\n")
    path.chmod(0o600)
    assert read_secret(path) == b"s" * 32
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read it"):
        read_secret(path)
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(ConfigError, match="16 to 4096"):
        read_secret(path)


@pytest.mark.parametrize(
    ("module", "flags", "says"),
    [
        ("router", ["--port=x"], "port"),
        ("router", ["--model=/nowhere"], "/nowhere"),
        ("splitfire.worker", ["--kv-memory=1MiB"], "--kv-memory"),
        ("splitfire.worker", ["--cpus=900"], "cpus: 900 cannot be used"),
        ("splitfire.worker", ["--ucx-devices=nonexistent0"], "nonexistent0"),  # B113
        ("splitfire.worker", ["--device=cuda"], "no CUDA device"),
        ("splitfire.worker", ["--max-context=4096"], "positions end at 2048"),
    ],
)
def test_a_service_that_cannot_start_says_so_in_one_line(module: str, flags: list[str], says: str) -> None:
    ended = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("splitfire: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in ended.stderr


def test_the_page_of_settings_is_printed_from_them() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert page.read_text() == describe(), "run: make docs"


@pytest.mark.parametrize("module", ["router", "splitfire.worker"])
def test_an_environment_that_cannot_carry_a_service_is_refused(module: str) -> None:
    """B116, B117."""
    slow = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    ended = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=60, check=False, env=slow)
    assert ended.returncode == 2
    assert "accepted: upb" in ended.stderr
    limited = f"ulimit -n 64; exec {sys.executable} -m {module}"
    few = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60, check=False)
    assert few.returncode == 2
    assert "needs 1024" in few.stderr


def test_an_odd_locale_and_time_zone_do_not_matter() -> None:
    """B118."""
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Chatham", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "router", "--model=/näh"], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert ended.returncode == 2
