"""A small blocking HTTP client for the command line: JSON to an OpenAI-compatible server, one connection a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from splitfire.core.errors import ConfigError

MAX_ANSWER_BYTES = 64 << 20
PORTS = {"http": 80, "https": 443}


class ConnectionLost(Exception):
    """Nobody answers, or the answer broke off: what was asked may be asked again."""


@dataclass(frozen=True, slots=True)
class HttpServer:
    """Where the paths begin. `context`: of TLS."""

    host: str
    port: int
    prefix: str
    context: ssl.SSLContext | None
    api_key: str | None

    @classmethod
    def parse(cls, url: str, api_key: str | None, authority: Path | None) -> HttpServer:
        """ConfigError when it is no URL, or the authority's certificate cannot be used."""
        try:
            parts = urlsplit(url)
            port = parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:  # of a port, or of brackets
            parts, port = urlsplit(""), 0
        if parts.scheme not in PORTS or not parts.hostname or not port or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"--server is {url!r}, accepted: http://HOST:PORT or https://HOST:PORT")
        context = None
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=str(authority) if authority is not None else None)
            except (OSError, ssl.SSLError) as exc:
                raise ConfigError(f"--tls-ca {authority}: cannot be used: {exc}") from exc
        return cls(parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"), context, api_key)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What came back."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def retry_after_s(self) -> float | None:
        value = self.headers.get("retry-after", "")
        return float(value) if value.isascii() and value.isdigit() and len(value) < 7 else None

    def error(self) -> str:
        """The server's own sentence, if it has one."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(self.body)["error"]["message"])
        return f"status {self.status}"


class HttpClient:
    """One thread's connection, opened when it is needed. Another thread may `abort` it."""

    def __init__(self, server: HttpServer, timeout_s: float) -> None:
        self._server = server
        if server.context is None:
            self._connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout_s)
        else:
            self._connection = http.client.HTTPSConnection(server.host, server.port, timeout=timeout_s, context=server.context)

    def ask(self, method: str, path: str, body: bytes | None = None) -> HttpAnswer:
        """ConnectionLost when there is no whole answer."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._server.api_key is not None:
            headers["Authorization"] = f"Bearer {self._server.api_key}"
        try:
            self._connection.request(method, self._server.prefix + path, body, headers)
            response = self._connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as exc:
            self._connection.close()
            raise ConnectionLost(str(exc) or type(exc).__name__) from exc
        if len(content) <= MAX_ANSWER_BYTES and response.length:  # what was announced did not all come
            self._connection.close()
            raise ConnectionLost("the connection broke in the middle of an answer")
        if len(content) > MAX_ANSWER_BYTES:
            self._connection.close()
            raise ConnectionLost(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        return HttpAnswer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    def abort(self) -> None:
        """Whoever waits for an answer is told ConnectionLost."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()
