"""`splitfire batch` against a server that answers as a test tells it to: every line gets one row, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import ROOT
from tests.e2e.fleets import until

Answer = tuple[int, dict[str, str]]
OK: Answer = (200, {})


def slow(seconds: float) -> Answer:
    time.sleep(seconds)
    return OK


class Fake:
    """A server of OpenAI's API; `decide` says how the nth request with a custom prompt is answered, None: its connection breaks."""

    def __init__(self) -> None:
        self.decide: Callable[[str, int], Answer | None] = lambda _prompt, _count: OK
        self.asked: Counter[str] = Counter()
        self.bodies: dict[str, dict[str, Any]] = {}
        self.keys: set[str | None] = set()
        self.num_open = self.most_open = self.num_gone = 0
        self.go_on = threading.Event()  # until then answers wait
        self.go_on.set()
        self.models_status = 200
        self.is_gone = False  # every connection breaks
        fake, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if fake.is_gone:
                    self._break()
                    return
                self._send(fake.models_status, {"data": []} if fake.models_status == 200 else {"error": {"message": "not you"}}, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["prompt"]
                with lock:
                    fake.asked[prompt] += 1
                    count = fake.asked[prompt]
                    fake.bodies[prompt] = body
                    fake.keys.add(self.headers["Authorization"])
                    fake.num_open += 1
                    fake.most_open = max(fake.most_open, fake.num_open)
                fake.go_on.wait(20)
                with lock:
                    fake.num_open -= 1
                decided = fake.decide(prompt, count)
                if decided is None or fake.is_gone:
                    self._break()
                    return
                status, headers = decided
                usage = {"prompt_tokens": 3, "completion_tokens": 5}
                made = {"text": prompt, "usage": usage} if status == 200 else {"error": {"message": "no", "code": str(status)}}
                self._send(status, made, headers)

            def _break(self) -> None:
                self.close_connection = True
                self.connection.close()

            def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
                content = json.dumps(body, indent=1).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), "X-Request-Id": "r-1", **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                    self.close_connection = headers.get("Content-Length", "") > ""  # it promised more
                except OSError:
                    fake.num_gone += 1

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.stop()


class Files:
    """An input and an output."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def write(self, count: int, *more: str) -> None:
        lines = [self.line(f"r{i}") for i in range(count)]
        self.input.write_text("\n".join([*lines, *more]) + "\n")

    def line(self, custom_id: str, **body: Any) -> str:
        asked = {"prompt": custom_id, **body}
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": asked})

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()] if self.output.exists() else []

    def command(self, server: str, *flags: str) -> list[str]:
        return [sys.executable, "-m", "splitfire.cli", "batch", str(self.input), "-o", str(self.output), "--server", server, *flags]

    def run(self, server: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(server, *flags), capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)

    def start(self, server: str, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(server, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_every_line_gets_an_answer_some_at_a_time(fake: Fake, files: Files, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("sf-" + "k" * 32)
    files.write(50, files.line("mine", service_tier="priority"))
    fake.go_on.clear()
    process = files.start(fake.url, "--concurrency=7", f"--api-key-file={key}")
    until(lambda: fake.num_open == 7)
    fake.go_on.set()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "51 requests: 51 answered; 153 + 255 tokens" in said
    rows = files.rows()
    assert {row["custom_id"] for row in rows} == {*(f"r{i}" for i in range(50)), "mine"}
    assert len(rows) == 51
    for row in rows:
        assert row["response"]["status_code"] == 200 and row["response"]["request_id"] == "r-1" and row["error"] is None
        assert row["response"]["body"]["text"] == row["custom_id"]
    assert fake.most_open == 7
    assert fake.bodies["r0"]["service_tier"] == "flex" and fake.bodies["mine"]["service_tier"] == "priority"
    assert fake.keys == {f"Bearer sf-{'k' * 32}"}


def test_what_can_succeed_later_is_sent_again(fake: Fake, files: Files) -> None:
    files.write(4, files.line("never"))
    tries: dict[str, list[Answer | None]] = {
        "r0": [(429, {"Retry-After": "4"}), OK], "r1": [(503, {}), OK], "r2": [None, OK], "r3": [(400, {})], "never": [(500, {})],
    }  # fmt: skip
    fake.decide = lambda prompt, count: tries[prompt][count - 1]
    began = time.monotonic()
    ran = files.run(fake.url)
    assert time.monotonic() - began >= 4, "no earlier than the server said"
    assert ran.returncode == 1
    assert "3 answered, 2 refused, 3 sent again" in ran.stdout
    assert {row["custom_id"]: row["response"]["status_code"] for row in files.rows()} == {
        "r0": 200, "r1": 200, "r2": 200, "r3": 400, "never": 500,
    }  # fmt: skip
    assert fake.asked == {"r0": 2, "r1": 2, "r2": 2, "r3": 1, "never": 1}


def test_tries_have_a_bound(fake: Fake, files: Files) -> None:
    files.write(20, files.line("full"), files.line("breaks"))
    fake.decide = lambda prompt, _: {"full": (429, {}), "breaks": None}.get(prompt, OK)
    ran = files.run(fake.url, "--give-up=2", "--concurrency=1")
    assert ran.returncode == 1
    rows = {row["custom_id"]: row for row in files.rows()}
    assert len(rows) == 22
    assert rows["full"]["response"]["status_code"] == 429
    assert rows["breaks"]["error"]["code"] == "connection_lost" and rows["breaks"]["response"] is None
    fake.decide = lambda _prompt, _count: OK
    assert files.run(fake.url, "--resume").returncode == 0, "what was turned away is asked again"
    assert [row["response"]["status_code"] for row in files.rows()] == [200] * 22


def test_a_server_that_is_gone_ends_the_run_and_another_goes_on(fake: Fake, files: Files) -> None:
    files.write(40)

    def decide(prompt: str, _: int) -> Answer:
        fake.is_gone |= int(prompt[1:]) >= 20
        return OK

    fake.decide = decide
    ran = files.run(fake.url, "--give-up=0.5", "--concurrency=4")
    assert ran.returncode == 1
    assert "nobody answers on 127.0.0.1" in ran.stderr and "--resume goes on" in ran.stderr
    num_done = len(files.rows())
    assert 16 <= num_done <= 20, "what is open has no row"
    assert f"{num_done} of 40 requests have a row" in ran.stderr
    fake.is_gone, fake.decide = False, lambda _prompt, _count: OK
    again = files.run(fake.url, "--resume")
    assert again.returncode == 0 and f"{40 - num_done} answered, {num_done} done before" in again.stdout
    assert sorted(row["custom_id"] for row in files.rows()) == sorted(f"r{i}" for i in range(40))


def test_bad_lines_are_rows_and_the_run_goes_on(fake: Fake, files: Files) -> None:
    files.write(3, "{", '{"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {}}', files.line("y", stream=True))
    ran = files.run(fake.url)
    assert ran.returncode == 1
    assert "3 answered, 3 bad lines" in ran.stdout
    bad = sorted((row["error"]["line"], row["error"]["param"], row["custom_id"]) for row in files.rows() if row["error"])
    assert bad == [(4, "line", None), (5, "url", "x"), (6, "body.stream", "y")]
    again = files.run(fake.url, "--resume")
    assert "0 answered, 3 bad lines, 3 done before" in again.stdout
    assert len(files.rows()) == 6, "each is told once"


def test_a_custom_id_twice_is_refused_before_anything_runs(fake: Fake, files: Files) -> None:
    files.write(3, files.line("r1"))
    ran = files.run(fake.url)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "'r1' is on line 2 and on line 4" in ran.stderr
    assert not fake.asked and not files.output.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_is_gone_on_with(fake: Fake, files: Files, how: signal.Signals) -> None:
    files.write(300)
    fake.decide = lambda _prompt, _count: slow(0.01)
    process = files.start(fake.url, "--concurrency=4")
    until(lambda: len(files.rows()) > 20, 20)
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=10)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "--resume goes on" in said and "Traceback" not in said
    before = files.output.read_bytes()
    assert before.endswith(b"\n")
    files.output.write_bytes(before + b'{"id": "batch_req_1", "custom_id": "r299", "resp')  # as a power cut may leave it
    asked = Counter(fake.asked)
    again = files.run(fake.url, "--resume")
    assert again.returncode == 0
    assert sorted(row["custom_id"] for row in files.rows()) == sorted(f"r{i}" for i in range(300)), "each once"
    assert files.output.read_bytes().startswith(before)
    assert sum((fake.asked - asked).values()) == 300 - before.count(b"\n")
    assert sum(asked.values()) - before.count(b"\n") <= 4, "no more is lost than was in flight"


def test_what_is_there_is_not_written_over(fake: Fake, files: Files) -> None:
    files.write(1)
    files.output.write_text("precious\n")
    ran = files.run(fake.url)
    assert ran.returncode == 2 and "--resume goes on with it" in ran.stderr
    assert files.output.read_text() == "precious\n"


@pytest.mark.parametrize("text", ["notes\n", "no end", '{"custom_id": "r0", "method": "POST"}\n', "{}\n"])
def test_what_is_no_answer_is_not_gone_on_with(fake: Fake, files: Files, text: str) -> None:
    """Nor cut off at its first line, as an answer would be that was not written whole."""
    files.write(1)
    files.output.write_text(text)
    ran = files.run(fake.url, "--resume")
    assert ran.returncode == 2 and "holds something else than answers" in ran.stderr
    assert files.output.read_text() == text


def test_an_answer_that_broke_off_is_asked_for_again(fake: Fake, files: Files) -> None:
    files.write(3)
    fake.decide = lambda prompt, count: (200, {"Content-Length": "4000"}) if (prompt, count) == ("r1", 1) else OK
    assert files.run(fake.url).returncode == 0
    assert [row["response"]["status_code"] for row in files.rows()] == [200] * 3
    assert all(row["response"]["body"]["text"] for row in files.rows())
    assert fake.asked["r1"] == 2


def test_two_runs_do_not_write_one_file(fake: Fake, files: Files) -> None:
    files.write(5)
    fake.go_on.clear()
    process = files.start(fake.url)
    until(lambda: fake.num_open == 5)
    ran = files.run(fake.url, "--resume")
    assert ran.returncode == 2 and "another run writes it" in ran.stderr
    fake.go_on.set()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_mistakes_are_a_line_before_anything_runs(fake: Fake, files: Files, tmp_path: Path) -> None:
    ran = files.run(fake.url)
    assert ran.returncode == 2 and "No such file" in ran.stderr
    files.write(1)
    for server, says, code in (
        ("ftp://x", "accepted: http://HOST:PORT", 2),
        ("http://[::1", "accepted: http://HOST:PORT", 2),
        ("http://127.0.0.1:9", "nobody answers on 127.0.0.1:9", 1),
    ):
        ran = files.run(server)
        assert ran.returncode == code and says in ran.stderr and "Traceback" not in ran.stderr
    fake.models_status = 401
    ran = files.run(fake.url)
    assert ran.returncode == 1 and "the server refuses: not you" in ran.stderr
    files.output = tmp_path / "nowhere" / "out.jsonl"
    assert files.run(fake.url).returncode == 2
    assert not fake.asked
