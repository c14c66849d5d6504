"""Where the time went, and who used what: over real processes, at the client, in metrics, in `splitfire trace` and in the usage file."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splitfire.cli.supervisor import free_port
from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import RunningFleet, greedy, lasting, start_fleet, until
from tests.e2e.test_tenants import bearer, key, table


def splitfire(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "splitfire.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def scrape(port: int, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return str(answer.read().decode())


def value(text: str, name: str) -> float:
    [found] = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found)


def timed(fleet: RunningFleet, prompt: list[int]) -> tuple[float, pb.Summary]:
    """Seconds to the first token by this process's clock, and what the router says."""
    began, first_s = time.monotonic(), 0.0
    for response in fleet.stub.Generate(greedy(prompt, 8), timeout=60):
        if response.token_ids and not first_s:
            first_s = time.monotonic() - began
        if response.HasField("summary"):
            return first_s, response.summary
    raise AssertionError("no summary")


def test_under_load_phases_add_up_to_the_routers_time_and_that_is_the_clients() -> None:
    with start_fleet("pico", 1, 1) as fleet, ThreadPoolExecutor(4) as pool:
        prompts = [[(7 * i + n) % 4000 for i in range(20 + 3 * n)] for n in range(100)]
        found = list(pool.map(lambda prompt: timed(fleet, prompt), prompts))
    off = []
    for client_s, summary in found:
        by_leg = dict.fromkeys((pb.LEG_FIRST_TOKEN, pb.LEG_SECOND_TOKEN, pb.LEG_REST), 0.0)
        for phase in summary.phases:
            by_leg[phase.leg] += phase.duration_s
        seconds = (summary.first_token_s, summary.second_token_s, summary.rest_s)
        assert list(by_leg.values()) == pytest.approx(seconds, abs=1e-9)
        off.append(client_s - summary.first_token_s)
    assert min(off) > 0, "nobody has a token before the router sends it"
    assert statistics.median(off) < 0.05  # benchmarks/router says how good it is; here four clients share a busy machine


def test_what_operators_see(tmp_path: Path) -> None:
    metrics, path = free_port(), tmp_path / "usage.jsonl"
    prices = tmp_path / "prices.toml"
    prices.write_text('[model."*"]\nprompt = 1.0\ngenerated = 10.0\n')
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(table("ops", "admin = true") + table("alice") + table("bob"))
    flags = (f"--metrics-port={metrics}", "--metrics-compat=vllm", f"--usage-file={path}", f"--prices-file={prices}")
    with start_fleet("pico", router=(*flags, f"--keys-file={keys}")) as fleet:
        summaries = {}
        for name in ("alice", "bob"):
            summaries[name] = fleet.generate(greedy(range(100, 400), 12, request_id=f"of-{name}"), metadata=bearer(name))[0].summary
        secret = tmp_path / "alice.key"
        secret.write_text(key("alice"))
        secret.chmod(0o600)
        ops = tmp_path / "ops.key"
        ops.write_text(key("ops"))
        ops.chmod(0o600)

        shown = splitfire("trace", "chatcmpl-of-alice", "--server", fleet.address, "--api-key-file", secret)
        assert shown.returncode == 0, shown.stderr
        assert f"to token 1: {1e3 * summaries['alice'].first_token_s:.1f} ms" in shown.stdout
        other = splitfire("trace", "of-bob", "--server", fleet.address, "--api-key-file", secret)
        assert (other.returncode, other.stdout) == (2, "")
        assert "not among the latest 1000 requests" in other.stderr
        assert "of-bob" in splitfire("trace", "--last", "5", "--server", fleet.address, "--api-key-file", ops).stdout
        assert "of-bob" not in splitfire("trace", "--slowest", "5", "--server", fleet.address, "--api-key-file", secret).stdout

        text = scrape(metrics)
        model = 'gen_ai_request_model="pico"'
        assert value(text, f"gen_ai_server_time_to_first_token_seconds_count{{{model}}}") == 2
        sums = [summary.first_token_s for summary in summaries.values()]
        assert value(text, f"gen_ai_server_time_to_first_token_seconds_sum{{{model}}}") == pytest.approx(sum(sums))
        legs = re.findall(r'^splitfire_phase_seconds_sum\{leg="first_token",phase="[a-z_-]+"\} (\S+)$', text, re.MULTILINE)
        assert sum(map(float, legs)) == pytest.approx(sum(sums))
        assert value(text, 'splitfire_handoff_total{outcome="received"}') == 2
        assert value(text, 'vllm:generation_tokens_total{model_name="pico"}') == 24
        assert value(text, 'splitfire_worker_blocks{role="decode",state="total",worker="decode-0"}') > 0

        until(lambda: path.exists() and len(path.read_text().splitlines()) == 2, 5)
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        assert [(row["tenant"], row["outcome"], row["generated_tokens"]) for row in rows] == [
            ("alice", "ok", 12),
            ("bob", "ok", 12),
        ]
        assert rows[0]["key"]
        assert rows[0]["key"] != rows[1]["key"]
        assert rows[0]["prefill_s"] > 0
        assert rows[0]["decode_s"] > 0
        everything = path.read_text() + text + "".join(child.log.read_text() for child in fleet.fleet.children)
        assert key("alice") not in everything
    shown = splitfire("usage", path, "--by", "tenant")
    assert re.search(r"^alice +1 +300 +0 +12 .* 0\.0004$", shown.stdout, re.MULTILINE), shown.stdout
    assert "none missing" in splitfire("usage", path, "--verify").stdout
    path.write_text(path.read_text().replace('"generated_tokens":12', '"generated_tokens":2', 1))
    broken = splitfire("usage", path)
    assert (broken.returncode, broken.stderr) == (2, f"splitfire: usage: {path}, line 1: was changed\n")


def test_a_cancelled_and_a_refused_request_are_in_the_books(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    with start_fleet("pico", router=(f"--usage-file={path}",)) as fleet:
        call = fleet.stub.Generate(lasting("given-up"), timeout=60)
        next(iter(call))
        call.cancel()
        with pytest.raises(Exception, match="top_p"):
            fleet.generate(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_p=7), request_id="refused"))
        until(lambda: path.exists() and len(path.read_text().splitlines()) == 2, 5)
        rows = {row["request_id"]: row for row in map(json.loads, path.read_text().splitlines())}
        assert rows["given-up"]["outcome"] == "cancelled"
        assert rows["given-up"]["generated_tokens"] >= 1
        assert (rows["refused"]["outcome"], rows["refused"]["prompt_tokens"]) == ("invalid_top_p", 0)
        [trace] = fleet.stub.GetTraces(pb.GetTracesRequest(id="given-up"), timeout=5).traces
        assert trace.outcome == "cancelled"
