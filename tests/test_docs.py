"""Pages that are true: links lead somewhere, commands parse, tables say what the code says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from splitfire.core.lifecycle import REQUEST, SEQUENCE
from splitfire.core.telemetry import STEPS
from splitfire.engine.blocks import BlockState
from tests import api_page
from tests.checkpoints import ROOT

PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md")) if p.name != "CHANGELOG.md")
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_no_page_has_a_gap_left_to_fill(page: Path) -> None:
    assert not re.search(r"^[A-Z]+_HERE$", page.read_text(), re.MULTILINE)


def test_the_request_table_has_the_ten_steps_in_order() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", README, re.MULTILINE)
    assert rows == [(str(i + 1), step) for i, step in enumerate(STEPS)]


def commands() -> list[str]:
    """Every `splitfire …` line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("splitfire ")]


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_readme_parse(line: str) -> None:
    """With --help at the end nothing is started, but unknown commands and flags are still refused."""
    arguments = shlex.split(line)[1:]
    flags = [a.split("=")[0] for a in arguments if a.startswith("--")]
    command = arguments[: 2 if arguments[0] == "bench" else 1]
    ran = subprocess.run(
        [sys.executable, "-m", "splitfire.cli", *command, "--help"], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for flag in flags:
        assert flag in ran.stdout


def test_the_readme_starts_with_the_two_commands() -> None:
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert first is not None
    assert [line.split()[0] for line in first[1].splitlines()] == ["scripts/demo", "scripts/test"]
    for script in ("scripts/demo", "scripts/test", "scripts/setup", "scripts/check", "scripts/genproto", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


def test_states_in_the_architecture_page_are_those_of_the_tables() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for states in (REQUEST, SEQUENCE, BlockState):
        for state in states:
            assert re.search(rf"\b{state.value}\b", page), state


def test_decisions_are_numbered_without_gaps() -> None:
    names = sorted(p.name for p in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    for path in (ROOT / "docs" / "decisions").glob("*.md"):
        assert path.read_text().startswith(f"# {path.name[:4]}: ")


def test_the_api_page_is_current() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == api_page.page() + "\n", "run: make docs"


def test_every_make_target_does_something() -> None:
    """A pattern rule does not serve a target that is phony: make then says that nothing is to be done, and is content."""
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in phony.split():
        said = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        ).stdout
        assert said and "Nothing to be done" not in said, target


def test_compose_publishes_the_clients_ports_and_dashboards_and_only_on_loopback() -> None:
    """gRPC and HTTP. S5 for what the file can say; bringing it up in an engine is a test of its own. On another address than loopback
    only a router with TLS and keys starts (tests/compose)."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert sorted(published) == [
        "${SPLITFIRE_ADDRESS:-127.0.0.1}:${SPLITFIRE_HTTP_PORT:-8000}:8000",
        "${SPLITFIRE_ADDRESS:-127.0.0.1}:${SPLITFIRE_PORT:-7070}:7070",
        "127.0.0.1:${GRAFANA_PORT:-3000}:3000",
        "127.0.0.1:${JAEGER_PORT:-16686}:16686",
    ]
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service and service.get("network_mode") != "host", name
    assert "USER 10001" in (ROOT / "Dockerfile").read_text()


def test_every_metric_is_on_its_page() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    found = [
        f"splitfire_{name}" + ("_total" if kind == "counter" else "")
        for path in (
            ROOT / "router" / "metrics.py",
            ROOT / "router" / "request_metrics.py",
            ROOT / "splitfire" / "worker" / "metrics.py",
        )
        for kind, name in re.findall(r'\b(gauge|counter)\(\s*"(\w+)"', path.read_text())
    ]
    assert len(found) > 20
    assert not [name for name in found if f"`{name}`" not in page]
