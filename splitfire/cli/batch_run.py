"""A batch file's requests against a server, some at a time, each answered once in the output file.

1. The main thread reads the input line by line; there are never more lines in memory than requests in flight.
2. Each of `concurrency` threads sends one and waits; what can succeed later (429, 503, a lost connection) it sends again.
3. The main thread writes each answer as one whole line, as they come.

A request that cannot be answered for `give_up_s` becomes a row of its own, unless the server answers nobody: then the run ends, without rows
for what is open.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from splitfire.cli.client import ServerError
from splitfire.cli.http_client import ConnectionLost, HttpAnswer, HttpClient, HttpServer
from splitfire.core.batch_lines import BatchRequest, Line, answer_row, custom_id_of, error_row, parse_line
from splitfire.core.errors import InvalidInput
from splitfire.core.row_file import RowFile

RETRYABLE = (429, 503)
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 10.0  # the server may say more
TIER = "flex"  # the class of what has none of its own: after everybody who waits for an answer
TICK_S = 0.25
SYNC_S = 1.0
END_S = 2.0
CONNECTION_LOST = "connection_lost"


@dataclass(frozen=True, slots=True)
class Result:
    """One line's row. None: there will be none, because the run ends."""

    row: bytes | None
    is_answered: bool = False
    is_bad_line: bool = False
    num_retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Tally:
    """How far it is. One thread writes it."""

    total: int  # lines, those of an earlier run among them
    earlier: int = 0
    answered: int = 0
    refused: int = 0
    bad_lines: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    began_at: float = field(default_factory=time.monotonic)

    @property
    def num_done(self) -> int:
        return self.answered + self.refused + self.bad_lines

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_at

    def add(self, result: Result) -> None:
        self.answered += result.is_answered
        self.bad_lines += result.is_bad_line
        self.refused += not result.is_answered and not result.is_bad_line
        self.retries += result.num_retries
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens


class BatchClient:
    """`run` once. Owned by the main thread, but for `_work` and what it calls."""

    def __init__(self, server: HttpServer, concurrency: int, timeout_s: float, give_up_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._give_up_s = give_up_s
        self._concurrency = concurrency
        self._lines: queue.Queue[Line | None] = queue.Queue(concurrency)
        self._results: queue.Queue[Result | ServerError] = queue.Queue(concurrency)
        self._clients = [HttpClient(server, timeout_s) for _ in range(concurrency)]
        self._is_ending = threading.Event()

    def check(self) -> None:
        """ServerError when nobody answers, or the key is not let in."""
        client = HttpClient(self._server, min(self._timeout_s, 30.0))
        try:
            answer = client.ask("GET", "/v1/models")
        except ConnectionLost as exc:
            raise ServerError(self._gone(str(exc))) from exc
        finally:
            client.close()
        if answer.status != 200:
            raise ServerError(f"the server refuses: {answer.error()}")

    def run(self, lines: Iterable[Line], output: RowFile, tally: Tally, show: Callable[[Tally], None]) -> None:
        """Every line gets a row. ServerError when the server is gone, OSError when the output cannot be written."""
        threads = [
            threading.Thread(target=self._work, args=(client,), name=f"batch-{index}", daemon=True)
            for index, client in enumerate(self._clients)
        ]
        for thread in threads:
            thread.start()
        synced_at, num_open = time.monotonic(), 0
        try:
            for line in lines:
                while num_open == self._concurrency:
                    num_open -= self._take(output, tally, show)
                self._lines.put(line)
                num_open += 1
                if time.monotonic() - synced_at > SYNC_S:
                    output.sync()
                    synced_at = time.monotonic()
            while num_open:
                num_open -= self._take(output, tally, show)
        finally:
            self._end(threads)
            while not self._results.empty():  # answered already
                self._write(self._results.get(), output, tally)
            output.sync()

    def _take(self, output: RowFile, tally: Tally, show: Callable[[Tally], None]) -> int:
        """Waits a moment for a result; how many there were."""
        show(tally)
        try:
            result = self._results.get(timeout=TICK_S)
        except queue.Empty:
            return 0
        if isinstance(result, ServerError):
            raise result
        self._write(result, output, tally)
        return 1

    def _write(self, result: Result | ServerError, output: RowFile, tally: Tally) -> None:
        if isinstance(result, Result) and result.row is not None:
            output.append(result.row)
            tally.add(result)

    def _end(self, threads: Iterable[threading.Thread]) -> None:
        """No thread waits any longer, for whatever it was; the server sees its clients go, and stops working for them."""
        self._is_ending.set()
        for _ in self._clients:
            try:
                self._lines.put_nowait(None)
            except queue.Full:
                break  # they look at the event as well
        for client in self._clients:
            client.abort()
        deadline = time.monotonic() + END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- on its own thread

    def _work(self, client: HttpClient) -> None:
        while not self._is_ending.is_set():
            line = self._lines.get()
            if line is None or self._is_ending.is_set():
                break
            try:
                result: Result | ServerError = self._answer(client, line)
            except ServerError as exc:
                result = exc
            except Exception as exc:  # whoever waits for this thread is told
                result = ServerError(f"line {line.number}: {type(exc).__name__}: {exc}")
            self._results.put(result)  # there is room for one of each thread
        client.close()

    def _answer(self, client: HttpClient, line: Line) -> Result:
        try:
            request = parse_line(line.content)
        except InvalidInput as exc:
            row = error_row(custom_id_of(line.content), exc.reason, f"line {line.number}: {exc}", line.number, exc.field)
            return Result(row, is_bad_line=True)
        body = json.dumps({"service_tier": TIER, **request.body}).encode()
        began, wait_s, num_retries = time.monotonic(), FIRST_WAIT_S, 0
        while True:
            answer, lost = None, ""
            try:
                answer = client.ask("POST", request.url, body)
            except ConnectionLost as exc:
                lost = str(exc)
            if answer is not None and answer.status not in RETRYABLE:
                return _result(request, answer, num_retries)
            if self._is_ending.is_set():
                return Result(None)
            wait_s = min(wait_s * 2, MOST_WAIT_S)
            pause_s = max(wait_s * random.uniform(0.5, 1.0), answer.retry_after_s or 0.0 if answer is not None else 0.0)
            if time.monotonic() + pause_s - began > self._give_up_s:
                if answer is not None:
                    return _result(request, answer, num_retries)
                self.check()  # whether it is this request alone
                message = f"no answer in {self._give_up_s:g} s and {num_retries + 1} tries: {lost}"
                return Result(error_row(request.custom_id, CONNECTION_LOST, message), num_retries=num_retries)
            num_retries += 1
            if self._is_ending.wait(pause_s):
                return Result(None)

    def _gone(self, why: str) -> str:
        server = self._server
        return f"nobody answers on {server.host}:{server.port} ({why}); start a fleet with `splitfire up`, or name another with --server"


def _result(request: BatchRequest, answer: HttpAnswer, num_retries: int) -> Result:
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):  # some other server's; it has no status of an answer, so that it is asked again
        row = error_row(request.custom_id, "invalid_answer", f"status {answer.status}, and the answer is not a JSON object")
        return Result(row, num_retries=num_retries)
    row = answer_row(request.custom_id, answer.status, answer.headers.get("x-request-id", ""), json.dumps(body).encode())
    used = body.get("usage")
    counts = [used.get(name) if isinstance(used, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
    return Result(
        row, is_answered=answer.status == 200, num_retries=num_retries, prompt_tokens=prompt, completion_tokens=completion
    )


def is_final(row: dict[str, Any]) -> bool:
    """Whether asking again would say the same. Of an earlier run's rows the others are dropped, and their requests run again."""
    response = row.get("response")
    return isinstance(response, dict) and response.get("status_code") not in RETRYABLE
