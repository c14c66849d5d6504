"""The metrics port: what it says, and that nobody can hold it."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import HTTPServer

import pytest
from prometheus_client.metrics_core import Metric

from splitfire.core import metrics
from splitfire.core.errors import ConfigError
from splitfire.core.metrics import MetricsPort, counter, gauge


def rows() -> list[Metric]:
    labels = ("side",)
    return [
        gauge("open", "Open ones", labels, [(("send",), 1), (("send",), 2), (('a"\n',), 3)]),
        counter("bytes", "All of them", labels, [(("receive",), 7)]),
    ]


@contextmanager
def port(
    collect: Callable[[], list[Metric]] = rows, post: Callable[[Callable[[], None]], object] = lambda call: call()
) -> Iterator[int]:
    opened = MetricsPort("127.0.0.1", 0, collect, post)
    yield opened.port
    opened.close()


def scrape(at: int, path: str = "/metrics") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{at}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, ""


def test_a_scrape_reads_what_is_there_now() -> None:
    with port() as at:
        status, text = scrape(at)
    assert status == 200
    assert 'splitfire_open{side="send"} 2.0' in text
    assert 'splitfire_open{side="a\\"\\n"} 3.0' in text
    assert 'splitfire_bytes_total{side="receive"} 7.0' in text
    assert "process_resident_memory_bytes" in text


def test_only_one_path_is_there() -> None:
    with port() as at:
        assert scrape(at, "/")[0] == 404


def test_a_process_that_does_not_answer_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "READ_S", 0.05)
    with port(post=lambda call: None) as at:
        assert scrape(at)[0] == 503

    def broken() -> list[Metric]:
        raise RuntimeError("a bug")

    with port(broken) as at:
        assert scrape(at)[0] == 503


def test_who_says_nothing_is_hung_up_on_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ANSWER_S", 0.1)
    with port() as at, socket.create_connection(("127.0.0.1", at)) as silent:
        began = time.monotonic()
        assert scrape(at)[0] == 200
        assert time.monotonic() - began < 5
        assert silent.recv(1) == b""


def test_a_port_that_is_taken_is_an_error_in_one_line() -> None:
    with port() as at, pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{at}"):
        MetricsPort("127.0.0.1", at, rows, lambda call: call())


class SeenAtOnce:
    """`is_closed` of a server whose thread comes out of a connection just when it is set."""

    def __get__(self, server: HTTPServer, _: object) -> bool:
        return bool(server.__dict__.get("is_closed", False))

    def __set__(self, server: HTTPServer, value: bool) -> None:
        server.__dict__["is_closed"] = value
        with suppress(OSError):
            socket.create_connection(server.socket.getsockname()).close()
        deadline = time.monotonic() + 5
        while server.socket.fileno() >= 0 and time.monotonic() < deadline:
            time.sleep(0.001)


def test_a_port_may_be_closed_while_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Server, "is_closed", SeenAtOnce())
    with port() as at:
        assert scrape(at)[0] == 200


def test_a_closed_port_does_not_listen() -> None:
    with port() as at:
        assert scrape(at)[0] == 200
    deadline = time.monotonic() + 5
    while True:
        try:
            socket.create_connection(("127.0.0.1", at)).close()
        except ConnectionRefusedError:
            break
        assert time.monotonic() < deadline
