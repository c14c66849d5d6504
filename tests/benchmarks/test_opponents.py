"""Servers of others: what they stream is counted right, they stand still when it is not their turn, and nothing of them stays."""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.opponents import server
from benchmarks.opponents.server import Command, Server, ServerFailed, ServerPlan
from benchmarks.serve.endpoints import HttpEndpoint, ask
from splitfire.cli.supervisor import free_port

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(child.pid).encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOGS", tmp_path)
    monkeypatch.setattr(server, "BUILD", tmp_path)
    monkeypatch.setattr(server, "ROOT", tmp_path)


def plan(code: str, port: int) -> ServerPlan:
    cpu = min(os.sched_getaffinity(0))
    return ServerPlan("a server", (Command((sys.executable, "-c", code, str(port)), {}, (cpu,)),), (port,), "")


def processes_of(port: int) -> list[psutil.Process]:
    found = [p for p in psutil.Process().children(recursive=True) if str(port) in " ".join(p.cmdline())]
    return [*found, *(c for p in found for c in p.children(recursive=True))]


def wait_until_all(everybody: list[psutil.Process], is_stopped: bool) -> None:
    """A signal takes its time to be obeyed."""
    deadline = time.monotonic() + 10
    while {p.status() == psutil.STATUS_STOPPED for p in everybody} != {is_stopped}:
        assert time.monotonic() < deadline, [p.status() for p in everybody]
        time.sleep(0.01)


def test_a_server_stands_still_while_others_are_measured_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SETTLE_S", 0.01)
    port = free_port()
    with Server(plan(HEALTHY, port)) as running:
        everybody = processes_of(port)
        assert len(everybody) >= 2, "the server and its child"
        running.pause()
        wait_until_all(everybody, is_stopped=True)
        running.resume()
        wait_until_all(everybody, is_stopped=False)
        running.pause()  # one that is stopped can be ended, too
    _, living = psutil.wait_procs(everybody, timeout=5)
    assert not [p for p in living if p.status() != psutil.STATUS_ZOMBIE]


def test_a_server_that_gives_up_says_why_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ServerFailed, match=r"code 3: no such model"):
        Server(plan("import sys; print('no such model'); sys.exit(3)", free_port())).__enter__()
    assert time.monotonic() - began < 10


def test_our_own_tuning_is_not_an_opponents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LD_PRELOAD", "")
    environment = server._environment({"VLLM_TARGET_DEVICE": "cpu"})
    assert "OMP_NUM_THREADS" not in environment and environment["VLLM_TARGET_DEVICE"] == "cpu"


def serve_once(*events: str, status: str = "200 OK") -> int:
    """A server that answers one request with these events; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            request = connection.makefile("rb")
            assert request.readline().startswith(b"POST /v1/completions")
            headers = http.client.parse_headers(request)
            request.read(int(headers["Content-Length"]))  # what is left unread resets the connection when it is closed
            body = "".join(f"data: {event}\n\n" for event in events)
            connection.sendall(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}".encode())

    threading.Thread(target=answer, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "events",
    [
        ('{"choices": [{"token_ids": [1], "text": ""}]}', '{"choices": [{"token_ids": [2, 3], "text": "x"}]}', "[DONE]"),
        ('{"choices": [{"text": "a"}]}', '{"choices": [{"text": "b"}]}', '{"choices": [{"text": "c"}]}', "[DONE]"),
    ],
    ids=["ids", "text alone"],
)
def test_tokens_are_counted_by_ids_else_by_pieces_of_text(events: tuple[str, ...]) -> None:
    assert len(ask(HttpEndpoint(serve_once(*events), "m"), [1, 2, 3], 3).token_times) == 3


def test_an_error_in_the_stream_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(HttpEndpoint(serve_once('{"error": "out of memory"}'), "m"), [1], 3)
    with pytest.raises(RuntimeError, match="answers 503"):
        ask(HttpEndpoint(serve_once(status="503 Busy"), "m"), [1], 3)
