"""The health check of containers, against servers that answer this and that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import ROOT


def check(**environment: str) -> tuple[int, str]:
    command = [sys.executable, "-I", "-S", str(ROOT / "deploy" / "image" / "health.py")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPLITFIRE_")}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=clean | environment)
    assert not ran.stderr
    return ran.returncode, ran.stdout.strip()


@contextmanager
def server(status: int, body: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its port, and what it was sent."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **json.loads(content)})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield str(listening.server_address[1]), asked
        listening.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "code", "says"),
    [
        (200, {"usage": {"completion_tokens": 2}}, 0, "2 tokens in"),
        (200, {"usage": {"completion_tokens": 1}}, 1, "1 tokens came"),
        (200, {"what": "is this"}, 1, "not well"),
        (429, {"error": {"message": "the queue is full"}}, 0, "without room"),
        (503, {"error": {"message": "no decode worker is attached"}}, 1, "503 no decode worker is attached"),
    ],
)
def test_a_router_is_well_when_two_tokens_come(status: int, body: dict[str, Any], code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sf-secret\n")
    with server(status, body) as (port, asked):
        assert check(SPLITFIRE_HTTP_PORT=port, SPLITFIRE_API_KEY_FILE=str(tmp_path / "key"))[0] == code
        told = check(SPLITFIRE_HTTP_PORT=port)
    assert told[0] == code and says in told[1]
    assert (asked[0]["path"], asked[0]["max_tokens"], asked[0]["key"]) == ("/v1/completions", 2, "Bearer sf-secret")
    assert asked[1]["key"] is None


def test_who_does_not_answer_is_not_well() -> None:
    assert check(SPLITFIRE_HTTP_PORT="9")[0] == 1


def test_a_worker_is_well_while_its_file_is_fresh(tmp_path: Path) -> None:
    file = tmp_path / "healthy"
    assert check(SPLITFIRE_HEALTH_FILE=str(file))[0] == 1
    file.touch()
    assert check(SPLITFIRE_HEALTH_FILE=str(file))[0] == 0
    os.utime(file, (time.time() - 60,) * 2)
    code, says = check(SPLITFIRE_HEALTH_FILE=str(file))
    assert code == 1 and "60 s ago" in says
