"""Whether this container is well: exit code 0 or 1, and a line that says why. What Docker's HEALTHCHECK runs.

A worker is well while its health file is fresh (splitfire/worker/health.py). A router is well when two tokens come out of its HTTP port:
the first is a prefill worker's, the second a decode worker's, so the whole way works, the hand-off included. One that has no room (429)
is well: it says so itself. Nothing of Splitfire is imported, and `python -I -S` leaves out the rest: it costs a twentieth of a second.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from pathlib import Path

STALE_S = 20.0  # four beats of the file
ANSWER_S = 10.0
TOKENS = 2
ASKED = {"prompt": "def health():", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "service_tier": "priority"}


def main() -> int:
    file = os.environ.get("SPLITFIRE_HEALTH_FILE")
    try:
        print(f"a worker, {fresh(Path(file)):.0f} s ago" if file else answered())  # noqa: T201
    except (OSError, http.client.HTTPException, ValueError, KeyError) as exc:
        print(f"not well: {exc}")  # noqa: T201
        return 1
    return 0


def fresh(path: Path) -> float:
    """Seconds since the worker touched it; OSError when it is not there."""
    age = time.time() - path.stat().st_mtime
    if age > STALE_S:
        raise ValueError(f"the worker was last well {age:.0f} s ago")
    return age


def answered() -> str:
    """Of the router in this container, in a line."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("SPLITFIRE_API_KEY_FILE"):
        headers["Authorization"] = f"Bearer {Path(key).read_text().strip()}"
    began = time.monotonic()
    connection = connect(int(os.environ.get("SPLITFIRE_HTTP_PORT") or 8000), os.environ.get("SPLITFIRE_TLS_CERT"))
    connection.request("POST", "/v1/completions", json.dumps(ASKED), headers)
    response = connection.getresponse()
    body = json.loads(response.read(1 << 20))
    if response.status == http.HTTPStatus.TOO_MANY_REQUESTS:
        return "a router without room"
    if response.status != http.HTTPStatus.OK:
        raise ValueError(f"{response.status} {body['error']['message']}")
    if (count := body["usage"]["completion_tokens"]) != TOKENS:
        raise ValueError(f"{count} tokens came, {TOKENS} were asked for")
    return f"a router, {TOKENS} tokens in {(time.monotonic() - began) * 1e3:.0f} ms"


def connect(port: int, certificate: str | None) -> http.client.HTTPConnection:
    """By TLS where the router has a certificate: exactly that one is trusted, whatever names are in it."""
    if not certificate:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    import ssl  # noqa: PLC0415 - only if used

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=ANSWER_S, context=context)


if __name__ == "__main__":
    sys.exit(main())
