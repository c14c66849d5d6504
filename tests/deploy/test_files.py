"""compose.yaml and deploy/ as they are written; tests/compose brings them up in an engine (`make test-compose`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from splitfire.core.settings import RouterSettings, WorkerSettings
from tests.checkpoints import ROOT
from tests.deploy.queries import DASHBOARDS, DEPLOY, OTHERS, documented, expressions, metric_of, names_in

COMPOSE_TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
DRAIN_S = max(60.0, RouterSettings.model_fields["router_grace_s"].default)  # the longest grace of any service
# Of the collector's distribution that compose.yaml names; each has a page in its documentation.
COMPONENTS = {"receivers": {"otlp"}, "processors": {"memory_limiter", "batch"}, "exporters": {"otlp"}}


def test_each_profile_has_one_router_and_workers_of_each_role() -> None:
    for profile, members in {
        "cpu": {"router", "prefill", "decode"},
        "tls": {"router-tls", "credentials", "prefill", "decode"},
        "gpu": {"router", "prefill-gpu", "decode-gpu"},
        "gpu-tls": {"router-tls", "credentials", "prefill-gpu", "decode-gpu"},
        "obs": {"otel-collector", "jaeger", "prometheus", "grafana"},
    }.items():
        assert {name for name, service in SERVICES.items() if profile in service["profiles"]} == members | {"node"}


def test_commands_of_the_page_name_what_is_there() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    commands = re.findall(r"docker compose (.*)", page)
    assert len(commands) > 10
    profiles = {profile for service in SERVICES.values() for profile in service["profiles"]}
    for command in commands:
        assert set(re.findall(r"--profile ([a-z-]+)", command)) <= profiles, command
        assert set(re.findall(r"(?:exec|kill --signal HUP|--entrypoint sh) ([a-z-]+)", command)) - {"SERVICE"} <= set(SERVICES), (
            command
        )
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)[=`]", page)) <= set(re.findall(r"[A-Z_]+", COMPOSE_TEXT)) | {
        "COMPOSE_PROFILES", "CUDA_VISIBLE_DEVICES", "UCX_RNDV_SCHEME",
    }  # fmt: skip


def test_images_of_others_are_pinned() -> None:
    for name, service in SERVICES.items():
        if service["image"] not in ("splitfire", "splitfire-gpu"):
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_members_share_the_node_and_have_time_to_drain() -> None:
    for name, service in SERVICES.items():
        if name.startswith(("router", "prefill", "decode")):
            assert service["network_mode"] == service["ipc"] == service["pid"] == "service:node", name
            assert float(service["stop_grace_period"].removesuffix("s")) > DRAIN_S, name


def test_settings_are_those_of_the_services() -> None:
    """A misspelt one would end its process, in a profile that no machine here can try."""
    for name, service in SERVICES.items():
        kind = RouterSettings if name.startswith("router") else WorkerSettings
        known = {f"SPLITFIRE_{field.upper()}" for field in kind.model_fields} | {"SPLITFIRE_API_KEY_FILE"}
        for variable in service.get("environment", {}):
            assert variable in known or not variable.startswith("SPLITFIRE_"), f"{name}: {variable}"


def test_the_example_of_env_has_every_variable_and_no_other() -> None:
    used = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE_TEXT))
    offered = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert offered == used - {"SPLITFIRE_LOG_LEVEL"} | offered & {"SPLITFIRE_LOG_LEVEL"}


def test_the_router_in_clear_text_is_told_where_it_is_published() -> None:
    [grpc, http] = SERVICES["node"]["ports"]
    address = SERVICES["router"]["environment"]["PUBLISHED_ON"]
    assert grpc.startswith(address + ":") and http.startswith(address + ":")
    assert "SPLITFIRE_INSECURE" not in SERVICES["router-tls"]["environment"]


def test_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume


def test_the_collectors_pipelines_are_made_of_what_it_has() -> None:
    config: Mapping[str, Any] = yaml.safe_load((DEPLOY / "otel-collector.yaml").read_text())
    assert set(config) == {*COMPONENTS, "service"}
    for kind, known in COMPONENTS.items():
        assert {name.split("/")[0] for name in config[kind]} <= known
        used = {name for pipeline in config["service"]["pipelines"].values() for name in pipeline[kind]}
        assert used == set(config[kind])
    [pipeline] = config["service"]["pipelines"].values()
    assert pipeline["processors"][0] == "memory_limiter", "it has to be first"
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")


def test_prometheus_scrapes_what_compose_starts() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    [router, worker] = config["scrape_configs"]
    assert router["static_configs"][0]["targets"] == [f"127.0.0.1:{SERVICES['router']['environment']['SPLITFIRE_METRICS_PORT']}"]
    for name in ("prefill", "decode", "prefill-gpu", "decode-gpu"):
        directory = SERVICES[name]["environment"]["SPLITFIRE_METRICS_TARGETS"]
        assert worker["file_sd_configs"][0]["files"] == [f"{directory}/*.json"]
        assert f"targets:{directory}" in SERVICES[name]["volumes"]
    assert f"targets:{directory}:ro" in SERVICES["prometheus"]["volumes"]


def test_grafana_finds_its_sources_and_dashboards() -> None:
    [prometheus, jaeger] = yaml.safe_load((DEPLOY / "grafana" / "datasources" / "datasources.yaml").read_text())["datasources"]
    assert prometheus["jsonData"]["exemplarTraceIdDestinations"][0]["datasourceUid"] == jaeger["uid"]
    [provider] = yaml.safe_load((DEPLOY / "grafana" / "providers" / "providers.yaml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARDS[0].name}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_of_a_dashboard_can_be_drawn(path: Any) -> None:
    """What Grafana asks of one: ids of its own, a place that no other has, a source that is there, queries with ids."""
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] and dashboard["title"] and dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        mine = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24 and not mine & cells, panel["title"]
        cells |= mine
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("timeseries", "stat") and panel["title"] and panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "prometheus" and panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_every_query_reads_metrics_that_are_documented() -> None:
    for where, expression in expressions():
        names = {metric_of(name) for name in names_in(expression)}
        assert names and names <= documented() | OTHERS, where


def test_a_query_of_a_metric_that_is_not_there_would_be_found() -> None:
    assert names_in('rate(splitfire_tokens_total{type="splitfire_x"}[5m]) / gen_ai_x') == {"splitfire_tokens_total", "gen_ai_x"}
