"""`python -m benchmarks.http_load [--quick]`: guidellm against `splitfire up pico`, over both kinds of completion, streamed.

What guidellm reports becomes rows; it and its four processes share the machine with the fleet. It needs no hub: its prompts are made of
the tokenizer in models/pico.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import QUICK_RESULTS, RESULTS, Row, write
from splitfire.cli.supervisor import free_port

ROOT = Path(__file__).resolve().parents[2]
GUIDELLM = ROOT / "build" / "guidellm-venv" / "bin" / "guidellm"
FORMATS = ("/v1/completions", "/v1/chat/completions")
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
STREAMS, REQUESTS = (1, 4, 16), 96
QUICK_STREAMS, QUICK_REQUESTS = (2,), 4
READY_S, RUN_S = 120.0, 900.0


@contextmanager
def serving() -> Iterator[str]:
    """The URL of a fleet of this machine, as a person would start it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "splitfire.cli", "up", "pico", "--port=0", f"--http-port={port}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("splitfire up did not become ready")
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(READY_S)


def is_ready(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
        return True
    return False


def run_tool(url: str, kind: str, streams: Sequence[int], num_requests: int, path: Path) -> dict[str, Any]:
    """guidellm's own report."""
    command = [
        str(GUIDELLM), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url},request_format={kind}",
        "--tokenizer", "kind=hf_auto,model=models/pico",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--profile", "kind=concurrent,streams=1", "--override", "profile.streams", ",".join(map(str, streams)),
        "--constraint", f"kind=max_requests,count={num_requests}", "--output", f"kind=json,path={path}",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
    if ran.returncode:
        raise SystemExit(f"guidellm ended with {ran.returncode}:\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def rows_of(kind: str, report: Mapping[str, Any]) -> list[Row]:
    """Of each number of streams: how many requests were answered, and how fast as the tool saw it."""
    rows = []
    for benchmark in report["benchmarks"]:
        metrics, streams = benchmark["metrics"], benchmark["config"]["strategy"]["streams"]
        case = f"{kind}, {streams} {'stream' if streams == 1 else 'streams'}, {PROMPT_TOKENS}/{OUTPUT_TOKENS} tokens"
        totals = metrics["request_totals"]
        answered, asked = totals["successful"], totals["total"]
        rows.append(Row(case, "requests answered", "", answered, None, "", answered / asked, "all", answered == asked, 0.0))
        for name, what in (("time_to_first_token_ms", "time to first token"), ("inter_token_latency_ms", "time between tokens")):
            found = metrics[name]["successful"]
            spread = (found["percentiles"]["p90"] - found["percentiles"]["p10"]) / 2
            rows.append(Row(case, f"{what}, median", "ms", found["median"], None, "", None, "", None, spread))
            rows.append(Row(case, f"{what}, p95", "ms", found["percentiles"]["p95"], None, "", None, "", None, 0.0))
        rate = metrics["output_tokens_per_second"]["successful"]["mean"]
        rows.append(Row(case, "output tokens", "1/s", rate, None, "", None, "", None, 0.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only shows that it all runs; nothing is kept")
    is_quick = parser.parse_args().quick
    streams, num_requests = (QUICK_STREAMS, QUICK_REQUESTS) if is_quick else (STREAMS, REQUESTS)
    rows, version = [], ""
    with serving() as url, tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            report = run_tool(url, kind, streams, num_requests, Path(folder) / "report.json")
            rows += rows_of(kind, report)
            version = report["metadata"]["guidellm_version"]
    command = f"python -m benchmarks.http_load{' --quick' if is_quick else ''}"
    write("http-guidellm-pico", rows, command, {"guidellm": version}, QUICK_RESULTS if is_quick else RESULTS)
    if not all(row.met for row in rows if row.met is not None):
        raise SystemExit("some requests were not answered")


if __name__ == "__main__":
    main()
