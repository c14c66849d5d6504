"""`splitfire trace` and `splitfire usage`: where the time of earlier requests went, and who used what."""

from __future__ import annotations

import fcntl
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from splitfire.cli.client import connect
from splitfire.cli.options import API_KEY_FILE, DEFAULT_SERVER, SERVER, TLS_CA
from splitfire.cli.render import print_waterfall
from splitfire.core.errors import ConfigError
from splitfire.core.usage import CONTINUED, BrokenChain, Price, ReadLine, UsageLine, read_lines, read_prices
from splitfire.v1 import inference_pb2 as pb

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)  # files have no edge
TRIES = 8  # routers may share a port: each knows its own requests, and a new connection may reach another one
COLUMNS = ("tenant", "key", "model", "outcome", "day")


def trace(
    name: Annotated[str, typer.Argument(help="a request's id, or its trace's; without one the slowest are listed")] = "",
    last: Annotated[int, typer.Option(min=0, max=1000, help="list so many of the latest requests")] = 0,
    slowest: Annotated[int, typer.Option(min=0, max=1000, help="list those that took longest to their first token")] = 0,
    server: SERVER = DEFAULT_SERVER,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Where the time of one of the latest 1000 requests went, or of several in a line each."""
    if name and (last or slowest):
        raise ConfigError("trace: an id, --last and --slowest are three ways to ask: choose one")
    if not name:
        with connect(server, api_key_file, tls_ca) as client:
            _print_list(client.traces(last=last, slowest=slowest or (0 if last else 10)))
        return
    for _ in range(TRIES):
        with connect(server, api_key_file, tls_ca) as client:
            found = client.traces(name=name.removeprefix("chatcmpl-").removeprefix("cmpl-"))  # as OpenAI's clients see it
        if found:
            break
    else:
        raise ConfigError(f"trace {name}: not among the latest 1000 requests of this router, or another tenant's")
    for one in found:
        out.print(f"{one.summary.request_id}: {one.outcome}, tenant {one.tenant}, ended {one.age_s:.0f} s ago", markup=False)
        print_waterfall(out, one.summary)


def _print_list(traces: list[pb.RequestTrace]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, is_number in (
        ("request", False), ("ended", True), ("outcome", False), ("tokens", True), ("to token 1", True), ("1 to 2", True),
        ("each", True), ("longest phase", False),
    ):  # fmt: skip
        table.add_column(title, justify="right" if is_number else "left", no_wrap=True)
    for one in traces:
        summary, usage = one.summary, one.summary.usage
        longest = max((p for p in summary.phases if p.leg == pb.LEG_FIRST_TOKEN), key=lambda p: p.duration_s, default=None)
        table.add_row(
            summary.request_id or "-",
            f"{one.age_s:.0f} s ago",
            one.outcome,
            f"{usage.prompt_tokens} + {usage.generated_tokens}",
            _ms(summary.first_token_s),
            _ms(summary.second_token_s),
            _ms(summary.each_token_s),
            f"{longest.name}, {longest.worker}: {longest.duration_s * 1e3:.1f} ms" if longest is not None else "-",
        )
    out.print(table)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds else "-"


@dataclass(slots=True)
class Total:
    """Of all lines that are alike."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cost: Decimal = Decimal(0)

    def add(self, line: UsageLine, cost: Decimal) -> None:
        self.requests += 1
        self.prompt += line.prompt_tokens
        self.cached += line.cached_tokens
        self.generated += line.generated_tokens
        self.prefill_s += line.prefill_s
        self.decode_s += line.decode_s
        self.cost += cost


def usage(
    files: Annotated[list[Path], typer.Argument(help="usage files, oldest first; those that were full, then the one in use")],
    by: Annotated[
        str, typer.Option(help="what to add up by, of tenant, key, model, outcome and day, comma separated")
    ] = "tenant,model",
    prices: Annotated[Path | None, typer.Option(help="TOML file of prices, instead of those in the lines")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="only check that nothing was changed or is missing")] = False,
) -> None:
    """Adds up what was used, and checks every line against its hash on the way."""
    columns = [column.strip() for column in by.split(",") if column.strip()]
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise ConfigError(f"--by: is {unknown[0]!r}, accepted: {', '.join(COLUMNS)}")
    table = read_prices(prices) if prices is not None else None
    totals: dict[tuple[str, ...], Total] = defaultdict(Total)
    num_lines = 0
    previous: str | None = None
    currencies: set[str] = set()
    for path in files:
        try:
            with path.open(encoding="ascii", errors="surrogateescape") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # a router may be writing
                for read in read_lines(file, str(path), previous=previous, may_be_cut=path is files[-1]):
                    num_lines, previous, line = num_lines + 1, read.hash, read.line
                    if line.outcome == CONTINUED:
                        continue
                    cost, currency = _cost(read, table)
                    currencies |= {currency} - {""}
                    values = {
                        "tenant": line.tenant,
                        "key": line.key,
                        "model": line.model,
                        "outcome": line.outcome,
                        "day": line.at[:10],
                    }
                    totals[tuple(values[column] for column in columns)].add(line, cost)
        except OSError as exc:
            raise ConfigError(f"usage {path}: {exc.strerror or exc}") from exc
        except BrokenChain as exc:
            raise ConfigError(f"usage: {exc}") from exc
    if verify:
        out.print(
            f"{num_lines} lines, none changed, none missing between the first and the last; the last has {previous or 'none'}"
        )
        return
    if len(currencies) > 1:
        raise ConfigError(f"usage: costs in {' and '.join(sorted(currencies))} make no sum: give --prices in one currency")
    _print_totals(columns, totals, "".join(currencies))


def _cost(read: ReadLine, prices: Mapping[str, Price] | None) -> tuple[Decimal, str]:
    """By these prices, or by those of the time when it was written; and in what."""
    if prices is None:
        return read.cost or Decimal(0), read.currency
    price = prices.get(read.line.model) or prices.get("*")
    return (read.line.cost(price), price.currency) if price is not None else (Decimal(0), "")


def _print_totals(columns: list[str], totals: dict[tuple[str, ...], Total], currency: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in columns:
        table.add_column(title, no_wrap=True)
    for title in ("requests", "prompt", "cached", "generated", "prefill s", "decode s", f"cost {currency}".strip()):
        table.add_column(title, justify="right", no_wrap=True)
    for names, total in sorted(totals.items()):
        numbers = (total.requests, total.prompt, total.cached, total.generated)
        table.add_row(
            *names, *map(str, numbers), f"{total.prefill_s:.2f}", f"{total.decode_s:.2f}", f"{total.cost:.4f}" if currency else "-"
        )
    out.print(table)
