"""What dashboards and alerts ask Prometheus, and the metrics that docs/observability.md has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml

from tests.checkpoints import ROOT

DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}  # every process that Prometheus knows has them
_WORDS = re.compile(r'\b(?:splitfire|gen_ai|process|up)(?:_[a-z_]+)?\b(?!\s*(?:=~?|!=|!~)\s*")')  # and not of labels


def expressions() -> Iterator[tuple[str, str]]:
    """Where each stands, and the expression."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield f"dashboard: {panel['title']}", target["expr"]
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alert: {rule['alert']}", rule["expr"]


def names_in(expression: str) -> set[str]:
    """The series it reads."""
    return set(_WORDS.findall(re.sub(r'"[^"]*"', '""', expression)))


def metric_of(series: str) -> str:
    """A histogram's name, of one of its series."""
    return re.sub(r"_(bucket|sum|count)$", "", series)


def documented() -> set[str]:
    """First column of the tables in docs/observability.md."""
    page = (ROOT / "docs" / "observability.md").read_text()
    return set(re.findall(r"^\| `([a-z_]+)", page, re.MULTILINE))
