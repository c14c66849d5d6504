"""`splitfire fleet` and `splitfire role`: who is there, and what each is."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from splitfire.cli.client import connect
from splitfire.cli.options import API_KEY_FILE, DEFAULT_SERVER, SERVER, TLS_CA
from splitfire.cli.render import decision_lines, fleet_table, pair_line
from splitfire.v1 import inference_pb2 as pb

out = Console(highlight=False, soft_wrap=True)


class NewRole(StrEnum):
    """What a worker can be made."""

    PREFILL = "prefill"
    DECODE = "decode"


def fleet(
    server: SERVER = DEFAULT_SERVER,
    last: Annotated[int, typer.Option(min=0, max=64, help="why the latest so many requests went where they went")] = 0,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Who is there, and how busy."""
    with connect(server, api_key_file, tls_ca) as client:
        status = client.fleet(last=last)
    out.print(fleet_table(status))
    for pair in status.pairs:
        out.print(pair_line(pair))
    for decision in status.decisions:
        for line in decision_lines(decision):
            out.print(line, markup=False)
    shared = f"; {status.num_routers} routers share them" if status.num_routers > 1 else ""
    out.print(
        f"{status.running_requests} requests running, {status.queued_requests} waiting; workers attach to "
        f"{', '.join(status.worker_ports)}{shared}"
    )


def role(
    worker: Annotated[str, typer.Argument(help="as `splitfire fleet` names it")],
    new_role: Annotated[NewRole, typer.Argument(metavar="prefill|decode")],
    server: SERVER = DEFAULT_SERVER,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Has a worker take on the other role, while it runs."""
    with connect(server, api_key_file, tls_ca) as client:
        client.change_role(worker, pb.ROLE_PREFILL if new_role is NewRole.PREFILL else pb.ROLE_DECODE)
    out.print(f"{worker} finishes or gives back what it has; `splitfire fleet` shows when it is a {new_role.value} worker")
