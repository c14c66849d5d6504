"""Group E of bad inputs: a wrong setting is one line that names it, its value and what is accepted; exit code 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitfire.core import limits
from splitfire.core.errors import ConfigError
from splitfire.core.flags import describe, parse_settings
from splitfire.core.secret_files import read_secret
from splitfire.core.settings import RouterSettings, WorkerSettings
from splitfire.core.values import parse_addresses, parse_bytes, parse_cpus
from tests.checkpoints import PICO


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
        (["--metrics-targets=/targets"], "give --metrics-port"),
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
        (["--kv-dtype=int4"], "'int8' or 'fp8_e4m3'"),
        (["--dtype=int8"], "'bf16', 'fp16' or 'fp32'"),
        (["--speculate=on"], "'off', 'auto', 'lookup', 'predicted' or 'model'"),
        (["--speculate=model"], "--draft-model"),
        (["--speculate=lookup", "--draft-model=pico-draft"], "draft_model is pico-draft, but speculate is lookup"),
        (["--speculate=off", "--draft-model=pico-draft"], "draft_model is pico-draft, but speculate is off"),
    ],
)
def test_a_wrong_worker_setting_is_named(flags: list[str], says: str) -> None:
    assert says in refusal(WorkerSettings, *flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-queued=-1"], "max_queued"),  # B107
        (["--max-queued=1e9"], "max_queued"),
        (["--max-queued-s=nan"], "max_queued_s"),
        (["--max-queued-s=0"], "max_queued_s"),
        (["--max-queued-s=1e999"], "max_queued_s"),  # and above the longest deadline, B108
        (["--max-queued-s=10min"], "max_queued_s"),
        (["--router-grace-s=-inf"], "router_grace_s"),
        (["--ttft-target-s=nan"], "ttft_target_s"),
        (["--max-requests=0"], "max_requests"),
        (["--port=70000"], "port"),
        (["--worker-port=-1"], "worker_port"),
        (["--split=sometimes"], "'always', 'auto' or 'never'"),
        (["--placement=best"], "'cost', 'round_robin'"),
        (["--max-context=8"], "max_context"),
        (["--canary=maybe"], "canary"),
        (["--maxqueued=5"], "did you mean --max-queued"),  # B106
        (["positional"], "unknown flag positional"),
    ],
)
def test_a_wrong_router_setting_is_named(flags: list[str], says: str) -> None:
    assert says in refusal(RouterSettings, *flags)


def test_a_setting_given_twice_counts_once() -> None:
    """B109: the last flag; a variable of another setting has no say."""
    assert parse_settings(RouterSettings, ["--max-queued=5", "--max-queued=7"], prog="router").max_queued == 7


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITFIRE_BLOK_SIZE", "16")
    assert "did you mean SPLITFIRE_BLOCK_SIZE?" in refusal(WorkerSettings)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (RouterSettings, ["--host=0.0.0.0"]),
        (RouterSettings, ["--worker-host=0.0.0.0", "--fleet-token-file=x"]),
        (RouterSettings, ["--host=::"]),
        (WorkerSettings, ["--status-host=0.0.0.0"]),
        (WorkerSettings, ["--metrics-host=0.0.0.0"]),
        (RouterSettings, ["--metrics-host=0.0.0.0", "--metrics-port=9090"]),
        (WorkerSettings, ["--ucx-devices=all"]),
        (WorkerSettings, ["--ucx-devices=eth0"]),
    ],
)
def test_an_address_others_can_reach_needs_consent(kind: type[WorkerSettings] | type[RouterSettings], flags: list[str]) -> None:
    """B112."""
    assert "--insecure" in refusal(kind, *flags)
    assert parse_settings(kind, [*flags, "--insecure"], prog="x").insecure


def test_one_port_for_two_services_is_refused() -> None:
    """B113."""
    assert "port and worker_port are both 7070" in refusal(RouterSettings, "--worker-port=7070")
    assert parse_settings(RouterSettings, ["--port=0", "--worker-port=0"], prog="router").port == 0


def test_limits_that_depend_on_one_another_fit() -> None:
    """B108: relations between the constants of limits.py."""
    assert limits.KEEPALIVE_TIMEOUT_S < limits.KEEPALIVE_TIME_S
    assert 2 * limits.REPORT_EVERY_S < limits.SUSPECT_AFTER_S < limits.DEAD_AFTER_S
    assert limits.MAX_QUEUED_S <= limits.DEFAULT_DEADLINE_S <= limits.MAX_DEADLINE_S
    assert limits.OFFER_PARKED_S < limits.GRANT_WAIT_S < limits.HOLD_S
    assert worker("--role=prefill").grace_s > limits.HOLD_S
    assert 4 * limits.MAX_POSITIONS <= limits.MAX_QUEUED_BYTES


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
    path.write_bytes(b"s" * 32 + b"\r\n")
    assert read_secret(path) == b"s" * 32
    word = b"hunter2"
    for bad in (b"", word, word * 4 + b"\n" + word, word * 4 + b"\0", (word + b" ") * 4, word * 4 + "é".encode(), word * 1000):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match="16 to 4096") as caught:
            read_secret(path)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "flags", "says"),
    [
        ("router", ["--trace-file=/nowhere/trace.json"], "trace_file /nowhere/trace.json: No such file"),
        ("router", ["--model-name=" + "x" * 200], "model_name"),
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


@pytest.mark.parametrize(
    ("module", "name", "content", "says"),
    [
        ("router", "config.json", b"{", "config.json: line 1 column 2"),
        ("splitfire.worker", "config.json", b"{", "config.json: line 1 column 2"),
        ("splitfire.worker", "model.safetensors", b"abc", "model.safetensors: is 3 bytes long"),
        ("router", "chat_template.jinja", b"\xff", "chat_template.jinja: is not UTF-8"),
        ("router", "tokenizer.json", b"{}", "tokenizer.json: "),
        (
            "router",
            "chat_template.jinja",
            b"{{ 1 / 0 }}",
            "chat_template: the model's chat template fails on it: ZeroDivisionError",
        ),
    ],
)
def test_a_damaged_model_stops_every_service_with_one_line(
    module: str, name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    """Group D as an operator sees it: exit 2, one line, no traceback."""
    model = Path(shutil.copytree(PICO, tmp_path / "model"))
    (model / name).write_bytes(content)
    command = [sys.executable, "-m", module, f"--model={model}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("splitfire: ")]
    assert (ended.returncode, len(lines)) == (2, 1), ended.stderr
    assert says in lines[0]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"TZ": "Nowhere/Odd"}, {"PYTHONOPTIMIZE": "1"}])
def test_an_odd_environment_changes_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    """B118, B116."""
    path = tmp_path / "näh"
    command = [sys.executable, "-m", "router", f"--model={path}"]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False, env={**os.environ, **environment})
    assert ended.returncode == 2
    assert b"Traceback" not in ended.stderr
    assert b"No such file or directory" in ended.stderr


def test_the_slow_protobuf_parser_is_refused() -> None:
    """B116: it has no limit on nesting."""
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    ended = subprocess.run(
        [sys.executable, "-m", "router"], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert ended.returncode == 2
    assert "accepted: upb" in ended.stderr


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


def test_a_fleet_without_a_place_for_its_logs_says_what_to_do() -> None:
    """B117: no directory for temporary files that can be written."""
    ended = subprocess.run(
        [sys.executable, "-c", "import tempfile; tempfile.tempdir = '/proc/nowhere'; from splitfire.cli.__main__ import main; main()", "up"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "set TMPDIR to one that can be written" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_odd_locale_and_time_zone_do_not_matter() -> None:
    """B118."""
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Chatham", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "router", "--model=/näh"], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert ended.returncode == 2
