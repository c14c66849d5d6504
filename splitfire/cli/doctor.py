"""`splitfire doctor`: proves that KV moves as fast as it can, here or in a running fleet, or says why not."""

from __future__ import annotations

import json as encoding
import os
from typing import Annotated, Literal

import typer
from rich.console import Console

from splitfire.cli.client import Client, connect
from splitfire.cli.doctor_view import as_json, print_diagnosis
from splitfire.cli.findings import Diagnosis, Member, PairReading, Unmeasured, exit_code, judge
from splitfire.cli.local_pair import EndError, LocalPair, local_pair
from splitfire.cli.options import API_KEY_FILE, TLS_CA
from splitfire.core.limits import MEASURE_TIMEOUT_S
from splitfire.core.machine import facts_from_wire, look_around
from splitfire.v1 import inference_pb2 as pb

ROLES = {pb.ROLE_PREFILL: "prefill", pb.ROLE_DECODE: "decode"}


def doctor(
    server: Annotated[
        str | None,
        typer.Option(envvar="SPLITFIRE_SERVER", help="host:port of a router: asks its fleet; default: a pair of its own"),
    ] = None,
    transport: Annotated[
        Literal["ucx", "tcp"] | None, typer.Option(envvar="SPLITFIRE_TRANSPORT", help="of a pair of its own; default: ucx")
    ] = None,
    json: Annotated[bool, typer.Option("--json", envvar="SPLITFIRE_JSON", help="print one JSON object and nothing else")] = False,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Measures how KV moves between workers, and says what is wrong; exit code 1 when that makes it slow or impossible."""
    diagnosis = look_here(transport) if server is None else ask_fleet(connect(server, api_key_file, tls_ca))
    findings = judge(diagnosis)
    if json:
        typer.echo(encoding.dumps(as_json(diagnosis, findings)))
    else:
        print_diagnosis(Console(highlight=False, soft_wrap=True), diagnosis, findings)
    raise typer.Exit(exit_code(findings))


def look_here(transport: str | None) -> Diagnosis:
    """A pair of processes on this machine."""
    num_cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]  # before we add to it
    try:
        with local_pair(transport) as pair:
            return _measured(pair, num_cpus, load)
    except EndError as exc:
        settings = look_around().ucx_settings
        fix = "correct what is named there" + (f"; in the environment: {' '.join(settings)}" if settings else "")
        return Diagnosis((), (), (Unmeasured("prefill", "decode", str(exc), fix),), num_cpus=num_cpus, load=load)


def _measured(pair: LocalPair, num_cpus: int, load: float) -> Diagnosis:
    try:
        return Diagnosis(pair.members, (pair.measure(),), (), pair.digest_cost(), num_cpus, load)
    except EndError as exc:
        return Diagnosis(pair.members, (), (Unmeasured("prefill", "decode", str(exc)),), num_cpus=num_cpus, load=load)


def ask_fleet(client: Client) -> Diagnosis:
    """Every pair of a running fleet, measured again now."""
    with client:
        status = client.fleet(timeout_s=2 * MEASURE_TIMEOUT_S, measure=True)
    return diagnosis_of(status)


def diagnosis_of(status: pb.GetFleetResponse) -> Diagnosis:
    workers = sorted(status.workers, key=lambda worker: (worker.role, worker.worker_id))
    members = tuple(Member(w.worker_id, ROLES.get(w.role, "worker"), facts_from_wire(w.machine)) for w in workers)
    pairs = tuple(
        PairReading(
            p.prefill_worker_id, p.decode_worker_id, p.transport, p.path, p.round_trip_s, p.round_trip_p99_s, p.bytes_per_s,
            p.memcpy_bytes_per_s, p.is_same_machine, p.age_s,
        ) for p in sorted(status.pairs, key=lambda p: (p.prefill_worker_id, p.decode_worker_id))
    )  # fmt: skip
    known = {(pair.prefill, pair.decode) for pair in pairs}
    prefills, decodes = ([m.name for m in members if m.role == role] for role in ("prefill", "decode"))
    missing = ((prefill, decode) for prefill in prefills for decode in decodes if (prefill, decode) not in known)
    reason = "it was never measured: nothing has come from one to the other"
    return Diagnosis(members, pairs, tuple(Unmeasured(prefill, decode, reason) for prefill, decode in missing))
