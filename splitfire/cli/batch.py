"""`splitfire batch`: a file of requests in OpenAI's batch format, run against a server; a line of the output each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from splitfire.cli.batch_run import BatchClient, Tally, is_final
from splitfire.cli.client import ServerError
from splitfire.cli.http_client import HttpServer
from splitfire.cli.options import API_KEY_FILE, TLS_CA
from splitfire.core import limits
from splitfire.core.batch_lines import ROW_BEGINS, CustomIds, Line, custom_id_of, digest_of, read_lines
from splitfire.core.errors import ConfigError, InvalidInput, one_line
from splitfire.core.row_file import RowFile
from splitfire.core.secret_files import read_secret

SHOW_TERMINAL_S, SHOW_FILE_S = 0.5, 10.0


def batch(
    input_file: Annotated[Path, typer.Argument(metavar="INPUT.jsonl", help="a request a line: custom_id, method, url, body")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the answers go, a line each, as they come")],
    server: Annotated[str, typer.Option(help="URL of a server of OpenAI's API")] = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="requests in flight")] = 16,
    resume: Annotated[bool, typer.Option("--resume", help="go on: skip requests that the output has an answer to")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=86400, help="seconds without a byte of an answer, until it is lost")
    ] = 900.0,
    give_up: Annotated[
        float, typer.Option(min=0, max=86400, help="seconds in which a request that is turned away is sent again")
    ] = 600.0,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Runs a file of requests in OpenAI's batch format. Ends with 0 when every one was answered, with 1 when some were not."""
    key = read_secret(api_key_file).decode() if api_key_file is not None else None
    client = BatchClient(HttpServer.parse(server, key, tls_ca), concurrency, timeout, give_up)
    with _opened(input_file) as source:
        total = _check(source)
        rows, finished = _open_output(output, is_resumed=resume)
        tally, progress = Tally(total, earlier=len(finished)), Progress(sys.stderr.isatty())
        try:
            client.check()
            client.run(_todo(source, finished), rows, tally, progress.show)
        except ServerError as exc:
            raise ServerError(f"{exc}; {_go_on(tally)}") from exc
        except OSError as exc:
            raise ServerError(f"{output}: {exc.strerror or exc}; {_go_on(tally)}") from exc
        except KeyboardInterrupt:
            typer.echo(f"splitfire: ended; {_go_on(tally)}", err=True)
            raise typer.Exit(130) from None
        finally:
            progress.end(tally)
            rows.close()
    typer.echo(summary(tally, output))
    if tally.answered < tally.num_done:
        raise typer.Exit(1)


class Progress:
    """One line on standard error: written over at a terminal, now and then elsewhere."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._next_at = time.monotonic() if is_terminal else time.monotonic() + SHOW_FILE_S

    def show(self, tally: Tally) -> None:
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + (SHOW_TERMINAL_S if self._is_terminal else SHOW_FILE_S)
            self._write(tally)

    def end(self, tally: Tally) -> None:
        if self._is_terminal:
            self._write(tally)
            sys.stderr.write("\n")

    def _write(self, tally: Tally) -> None:
        line = progress_line(tally)
        sys.stderr.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()


def progress_line(tally: Tally) -> str:
    done, elapsed_s = tally.num_done, max(tally.elapsed_s, 1e-9)
    left = tally.total - tally.earlier - done
    parts = [
        f"{tally.earlier + done} of {tally.total}",
        f"{done / elapsed_s:.1f}/s",
        f"{tally.completion_tokens / elapsed_s:.0f} tokens/s",
    ]
    if done and left:
        parts.append(f"{left / done * elapsed_s:.0f} s left")
    if not_answered := done - tally.answered:
        parts.append(f"{not_answered} not answered")
    return ", ".join(parts)


def summary(tally: Tally, output: Path) -> str:
    parts = [f"{tally.answered} answered"]
    for count, what in ((tally.refused, "refused"), (tally.bad_lines, "bad lines"), (tally.earlier, "done before")):
        if count:
            parts.append(f"{count} {what}")
    again = f", {tally.retries} sent again" if tally.retries else ""
    tokens = f"{tally.prompt_tokens} + {tally.completion_tokens} tokens in {tally.elapsed_s:.1f} s"
    rate = f"{tally.completion_tokens / max(tally.elapsed_s, 1e-9):.0f} tokens/s"
    return f"{tally.total} requests: {', '.join(parts)}{again}; {tokens}, {rate}; {output}"


def _go_on(tally: Tally) -> str:
    return f"{tally.earlier + tally.num_done} of {tally.total} requests have a row; --resume goes on"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except IsADirectoryError as exc:
        raise ConfigError(f"{path}: is a directory") from exc
    except (FileNotFoundError, PermissionError) as exc:
        raise ConfigError(f"{exc.filename or path}: {exc.strerror}") from exc


def _open_output(path: Path, *, is_resumed: bool) -> tuple[RowFile, set[bytes]]:
    """The file, which nobody else writes meanwhile, and digests of the custom_ids that it has an answer to."""
    try:
        rows = _locked(path)
        if not is_resumed and rows.num_bytes:
            rows.close()
            raise ConfigError(f"{path}: is there; --resume goes on with it, or give another --output")
        _require_rows(path)
        kept, num_dropped = set(), 0
        for row in rows.rows():
            if is_final(row) and isinstance(row.get("custom_id"), str):
                kept.add(digest_of(row["custom_id"]))
            else:
                num_dropped += 1
        return _without_open(rows) if num_dropped else rows, kept
    except OSError as exc:
        raise ConfigError(f"{exc.filename or path}: {exc.strerror or exc}") from exc


def _require_rows(path: Path) -> None:
    """Before anything of it is cut off: a file of something else is left alone."""
    with path.open("rb") as file:
        first = file.readline(limits.MAX_BATCH_LINE_BYTES)
    try:
        row = json.loads(first) if first.endswith(b"\n") else None
    except (ValueError, RecursionError):
        row = None
    is_row = isinstance(row, dict) and {"custom_id", "response", "error"} <= set(row)
    is_cut = not first.endswith(b"\n") and first.startswith(ROW_BEGINS[: len(first)])
    if not is_row and not is_cut:
        raise ConfigError(f"{path}: holds something else than answers of a batch; give another --output")


def _without_open(rows: RowFile) -> RowFile:
    """The file again with the answers alone: what has none is asked for again. Whole or not at all."""
    path = rows.path
    new_path = path.with_name(f".{path.name}.new")
    new_path.unlink(missing_ok=True)
    new = _locked(new_path)  # before it has its name
    for row in rows.rows():
        if is_final(row):
            new.append(json.dumps(row).encode() + b"\n")
    new.sync()
    new_path.rename(path)
    rows.close()
    new.path = path
    return new


def _locked(path: Path) -> RowFile:
    rows = RowFile(path)
    try:
        fcntl.flock(rows.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        rows.close()
        raise ConfigError(f"{path}: another run writes it") from exc
    return rows


def _check(source: BinaryIO) -> int:
    """How many lines there are. ConfigError when two have one custom_id: what answers which could not be told."""
    ids, count = CustomIds(), 0
    for line in read_lines(source):
        count += 1
        custom_id = custom_id_of(line.content)
        if custom_id is not None:
            try:
                ids.add(custom_id, line.number)
            except InvalidInput as exc:
                raise ConfigError(one_line(str(exc))) from exc
    source.seek(0)
    return count


def _todo(source: BinaryIO, finished: set[bytes]) -> Iterator[Line]:
    for line in read_lines(source):
        custom_id = custom_id_of(line.content)
        if custom_id is None or digest_of(custom_id) not in finished:
            yield line
