"""The profile `obs`, as far as its images can be had: Prometheus from Debian's package in the container that compose.yaml describes, and
a receiver of spans in the collector's place. Grafana and Jaeger are not run; tests/deploy reads their files.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.checkpoints import ROOT
from tests.compose.node import FIXED, HERE, Node, run, up
from tests.deploy.queries import documented, expressions, names_in
from tests.e2e.fleets import greedy, until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed: apt-get install prometheus"),
]
# Nothing is drafted here; the router does not count hand-offs yet.
SILENT = {"dashboard: Drafts accepted"}
SERVICES = ("node", "router", "prefill", "decode", "prometheus", "otel-collector")


class Observed:
    """The node, and its Prometheus."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def ask(self, path: str) -> Any:
        """Prometheus' HTTP API, from inside the node's network, where nothing is published."""
        read = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090/api/v1/{path}', timeout=10).read().decode())"
        code, said = self.node.container("router").execute("python", "-c", read)
        assert code == 0, said
        return json.loads(said)["data"]

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.ask(f"query?query={quote(expression, safe='')}")["result"]
        return found

    def up_by_job(self) -> dict[str, list[str]]:
        """Values of `up`."""
        jobs: dict[str, list[str]] = {}
        for row in self.query("up"):
            jobs.setdefault(row["metric"]["job"], []).append(row["value"][1])
        return jobs


@pytest.fixture(scope="module")
def observed() -> Iterator[Observed]:
    endpoint = "http://otel-collector:4317"
    files = (FIXED, HERE / "stand_ins.yaml")
    with up("--scale", "decode=2", *SERVICES, profiles=["cpu", "obs"], files=files, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as node:
        node.wait_whole(3, 2)
        observed = Observed(node)
        until(lambda: "9090" in observed.node.container("prometheus").logs(), 30)
        yield observed


def test_promtool_accepts_what_prometheus_is_given() -> None:
    assert "SUCCESS" in run("promtool", "check", "config", str(ROOT / "deploy" / "prometheus.yml"))
    assert "SUCCESS" in run("promtool", "check", "rules", str(ROOT / "deploy" / "alerts.yml"))


def test_alerts_fire_for_what_they_are_for() -> None:
    """Over series that are made up: tests/compose/alerts_test.yaml."""
    assert "SUCCESS" in run("promtool", "test", "rules", str(HERE / "alerts_test.yaml"))


def test_router_and_every_replica_are_scraped(observed: Observed) -> None:
    until(lambda: observed.up_by_job() == {"router": ["1"], "worker": ["1", "1", "1"]}, 60, lambda: str(observed.up_by_job()))
    named = {row["metric"]["worker"] for row in observed.query('up{job="worker"}')}
    assert named == set(observed.node.workers())


def test_a_worker_that_was_killed_is_missed_until_another_takes_its_place(observed: Observed) -> None:
    """The alert WorkerGone is of the first: its file stays, and the next worker that starts takes it away."""
    victim = observed.node.containers("decode")[0]
    gone = observed.node.worker_in(victim)
    run("docker", "kill", victim.id)
    until(lambda: observed.query(f'up{{worker="{gone}"}} == 0'), 60)
    run("docker", "start", victim.id)
    until(lambda: not observed.query(f'up{{worker="{gone}"}}'), 60)
    until(lambda: observed.up_by_job() == {"router": ["1"], "worker": ["1", "1", "1"]}, 60)
    observed.node.wait_whole(3, 2)


def test_queries_of_dashboards_and_alerts_are_understood_and_find_what_is_there(observed: Observed) -> None:
    """Each of them is asked. Those whose metrics the fleet exports now must find something, but for what nothing has happened of."""
    for _ in observed.node.stub().Generate(greedy(count=32), timeout=30):
        pass
    until(lambda: observed.query('splitfire_handoff_bytes_total{side="receive"} > 0'), 60)
    exported = set(observed.ask("label/__name__/values"))

    def missing() -> set[str]:
        silent = set()
        for where, expression in expressions():
            found = observed.query(expression.replace("$__rate_interval", "1m"))
            if names_in(expression) <= exported and not found and where.startswith("dashboard"):
                silent.add(where)
        return silent - SILENT

    until(lambda: not missing(), 60, lambda: str(missing()))  # rates need two scrapes


def test_whatever_is_exported_is_documented(observed: Observed) -> None:
    exported = {re.sub(r"_(bucket|sum|count)$", "", name) for name in observed.ask("label/__name__/values")}
    ours = {name for name in exported if name.startswith(("splitfire_", "gen_ai_"))}
    assert ours
    assert not ours - documented()


def test_alerts_are_loaded_and_none_fires_in_a_sound_fleet(observed: Observed) -> None:
    [group] = observed.ask("rules")["groups"]
    assert len(group["rules"]) > 5
    assert not [rule["name"] for rule in group["rules"] if rule.get("lastError")]
    assert not [rule["name"] for rule in group["rules"] if rule["state"] == "firing"]


def test_spans_of_all_services_arrive_under_one_trace(observed: Observed) -> None:
    for _ in observed.node.stub().Generate(greedy(count=4), timeout=30):
        pass
    sink = observed.node.container("otel-collector")

    def traces() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for line in sink.logs().splitlines():
            if line.startswith("{"):
                span = json.loads(line)
                found.setdefault(span["trace"], set()).add(span["service"])
        return found

    whole = {"splitfire-router", "splitfire-prefill", "splitfire-decode"}
    until(lambda: any(services == whole for services in traces().values()), 30, lambda: str(traces()))


def test_without_the_collector_answers_come_as_before(observed: Observed) -> None:
    """F68, in containers: its name is not even known any more."""
    began = time.monotonic()
    assert any(r.token_ids for r in observed.node.stub().Generate(greedy(count=16), timeout=30))
    calm = time.monotonic() - began
    observed.node.compose("rm", "--stop", "--force", "otel-collector")
    began = time.monotonic()
    assert any(r.token_ids for r in observed.node.stub().Generate(greedy(count=16), timeout=30))
    assert time.monotonic() - began < calm + 2.0
