"""`splitfire`: up, generate, chat, fleet, doctor, demo, key, certs, simulate, advise; router, prefill and decode start one service each."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from splitfire.cli.advise import advise
from splitfire.cli.client import Client, ServerError, connect
from splitfire.cli.credentials import certs, key
from splitfire.cli.doctor import doctor
from splitfire.cli.formats import read_text, response_format
from splitfire.cli.options import API_KEY_FILE, DEFAULT_SERVER, SERVER, TIMEOUT, TLS_CA
from splitfire.cli.render import decision_lines, fleet_table, pair_line, print_waterfall
from splitfire.cli.supervisor import Fleet, FleetPlan, default_cpus, free_port
from splitfire.core.errors import ConfigError, one_line
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model, served_name
from splitfire.core.settings import exit_with, parse_cpus
from splitfire.v1 import inference_pb2 as pb

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Disaggregated LLM inference: prefill here, decode there.",
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
DEMO_PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x"

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class NewRole(StrEnum):
    """What a worker can be made."""

    PREFILL = "prefill"
    DECODE = "decode"


@app.command()
def up(
    model: Annotated[str, typer.Argument(envvar="SPLITFIRE_MODEL", help="pico, a model directory, or a hub id")] = "pico",
    prefill: Annotated[int, typer.Option(envvar="SPLITFIRE_PREFILL", min=0, max=64, help="prefill workers")] = 1,
    decode: Annotated[int, typer.Option(envvar="SPLITFIRE_DECODE", min=1, max=64, help="decode workers")] = 1,
    aggregated: Annotated[bool, typer.Option("--aggregated", envvar="SPLITFIRE_AGGREGATED", help="no prefill workers")] = False,
    port: Annotated[int, typer.Option(envvar="SPLITFIRE_PORT", min=0, max=65535, help="for clients; 0 draws one")] = 7070,
    http_port: Annotated[
        int, typer.Option(envvar="SPLITFIRE_HTTP_PORT", min=0, max=65535, help="for OpenAI's clients; 0 draws one")
    ] = 8000,
    routers: Annotated[int, typer.Option(envvar="SPLITFIRE_ROUTERS", min=1, max=16, help="router processes, on one port")] = 1,
    device: Annotated[str | None, typer.Option(envvar="SPLITFIRE_DEVICE", help="cpu or cuda")] = None,
    dtype: Annotated[str | None, typer.Option(envvar="SPLITFIRE_DTYPE", help="auto, bf16, fp16 or fp32")] = None,
    weights: Annotated[str | None, typer.Option(envvar="SPLITFIRE_WEIGHTS", help="auto or int8")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(envvar="SPLITFIRE_KV_DTYPE", help="auto, bf16, fp16, fp32, int8 or fp8_e4m3")
    ] = None,
    split: Annotated[str | None, typer.Option(envvar="SPLITFIRE_SPLIT", help="always, auto or never")] = None,
    prefill_cpus: Annotated[str, typer.Option(envvar="SPLITFIRE_PREFILL_CPUS", help="processors, such as 0 or 0-3")] = "",
    decode_cpus: Annotated[str, typer.Option(envvar="SPLITFIRE_DECODE_CPUS", help="processors, such as 1 or 4-7")] = "",
    kv_memory: Annotated[str | None, typer.Option(envvar="SPLITFIRE_KV_MEMORY", help="of each worker, such as 1GiB")] = None,
    block_size: Annotated[int | None, typer.Option(envvar="SPLITFIRE_BLOCK_SIZE", help="tokens a KV block")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(envvar="SPLITFIRE_CHUNK_TOKENS", help="tokens a step")] = None,
    max_context: Annotated[int | None, typer.Option(envvar="SPLITFIRE_MAX_CONTEXT", help="tokens a sequence")] = None,
    speculate: Annotated[
        str | None, typer.Option(envvar="SPLITFIRE_SPECULATE", help="off, auto, lookup, predicted or model")
    ] = None,
    draft_model: Annotated[str | None, typer.Option(envvar="SPLITFIRE_DRAFT_MODEL", help="such as pico-draft for pico")] = None,
    transport: Annotated[str | None, typer.Option(envvar="SPLITFIRE_TRANSPORT", help="of KV: ucx or tcp")] = None,
    keys_file: Annotated[Path | None, typer.Option(envvar="SPLITFIRE_KEYS_FILE", help="tenants and their API keys")] = None,
    trace_file: Annotated[Path | None, typer.Option(envvar="SPLITFIRE_TRACE_FILE", help="spans, for Perfetto")] = None,
) -> None:
    """Starts a fleet on this machine and keeps it up until Ctrl-C."""
    flags = {
        "--device": device,
        "--dtype": dtype,
        "--weights": weights,
        "--kv-dtype": kv_dtype,
        "--kv-memory": kv_memory,
        "--block-size": block_size,
        "--chunk-tokens": chunk_tokens,
        "--speculate": speculate,
        "--draft-model": resolve_model(draft_model) if draft_model else None,
        "--transport": transport,
    }
    http_port = http_port or free_port()
    router_flags = {"--split": split, "--keys-file": keys_file.absolute() if keys_file else None, "--http-port": http_port}
    shared = {"--max-context": max_context, "--trace-file": trace_file.absolute() if trace_file else None}
    fleet_plan = make_plan(
        model, 0 if aggregated else prefill, decode, port, prefill_cpus, decode_cpus,
        router_flags=given(router_flags), worker_flags=given(flags), shared_flags=given(shared), num_routers=routers,
    )  # fmt: skip
    with running(fleet_plan) as fleet:
        out.print(
            f"\nTry it:  [bold]splitfire generate 'def fibonacci(n):' --server {fleet.address}[/]\n"
            f"OpenAI's clients:  http://127.0.0.1:{http_port}/v1\n(logs: {fleet.directory}; Ctrl-C ends it)"
        )
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(0.2)
                fleet.watch()
        err.print("ending the fleet")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads standard input")],
    server: SERVER = DEFAULT_SERVER,
    max_tokens: Annotated[int, typer.Option(envvar="SPLITFIRE_MAX_TOKENS", min=1, help="at most this many tokens")] = 128,
    temperature: Annotated[
        float | None, typer.Option(envvar="SPLITFIRE_TEMPERATURE", help="0 is greedy; default: the model's")
    ] = None,
    top_p: Annotated[float | None, typer.Option(envvar="SPLITFIRE_TOP_P", help="nucleus")] = None,
    top_k: Annotated[int | None, typer.Option(envvar="SPLITFIRE_TOP_K", help="most likely k")] = None,
    seed: Annotated[int | None, typer.Option(envvar="SPLITFIRE_SEED", help="the same seed gives the same tokens")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(envvar="SPLITFIRE_STOP", help="end before this text; may be given several times")
    ] = None,
    predicted: Annotated[
        Path | None, typer.Option(envvar="SPLITFIRE_PREDICTED", help="file that the answer will resemble: faster where it does")
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(envvar="SPLITFIRE_JSON_SCHEMA", help="the answer is JSON of this schema"),
    ] = None,
    regex: Annotated[str | None, typer.Option(envvar="SPLITFIRE_REGEX", help="the whole answer matches this")] = None,
    grammar: Annotated[Path | None, typer.Option(envvar="SPLITFIRE_GRAMMAR", help="the answer follows this GBNF")] = None,
    trace: Annotated[bool, typer.Option("--trace", envvar="SPLITFIRE_TRACE", help="show where the time went")] = False,
    timeout: TIMEOUT = 600.0,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Streams the continuation of a text."""
    text = sys.stdin.read() if prompt == "-" else prompt
    request = pb.GenerateRequest(
        text=text,
        predicted_output=read_text("--predicted", predicted) if predicted is not None else "",
        response_format=response_format(json_schema, regex, grammar),
        sampling=pb.SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        stopping=pb.StoppingParams(max_tokens=max_tokens, stop=stop or []),
    )
    with connect(server, api_key_file, tls_ca) as client:
        summary = stream_answer(client, request, timeout)
    if trace and summary is not None:
        err.print()
        print_waterfall(err, summary)


@app.command()
def chat(
    server: SERVER = DEFAULT_SERVER,
    max_tokens: Annotated[int, typer.Option(envvar="SPLITFIRE_MAX_TOKENS", min=1, help="of one answer")] = 256,
    timeout: TIMEOUT = 600.0,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """A conversation; an empty line or Ctrl-D ends it."""
    with connect(server, api_key_file, tls_ca) as client:
        out.print(f"[dim]{client.model().id} on {server}; an empty line ends[/]")
        messages: list[pb.ChatMessage] = []
        session = f"chat-{os.getpid()}"
        while line := _ask():
            messages.append(pb.ChatMessage(role="user", content=line))
            request = pb.GenerateRequest(messages=messages, stopping=pb.StoppingParams(max_tokens=max_tokens), session_id=session)
            answer: list[str] = []
            stream_answer(client, request, timeout, answer)
            messages.append(pb.ChatMessage(role="assistant", content="".join(answer)))


@app.command()
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


@app.command()
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


app.command()(advise)
app.command()(doctor)
app.command()(key)
app.command()(certs)


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(envvar="SPLITFIRE_DEMO_PROMPT")] = DEMO_PROMPT,
    max_tokens: Annotated[int, typer.Option(envvar="SPLITFIRE_DEMO_TOKENS", min=2, help="how long the answer is")] = 96,
    trace_file: Annotated[Path | None, typer.Option(envvar="SPLITFIRE_TRACE_FILE", help="spans, for Perfetto")] = None,
) -> None:
    """The main job once: router, prefill and decode, one answer, where its time went; nothing is left running."""
    began = time.monotonic()
    shared = given({"--trace-file": trace_file.absolute() if trace_file else None})
    plan = make_plan("pico", 1, 1, free_port(), "", "", router_flags=("--split=always",), worker_flags=(), shared_flags=shared)
    with running(plan) as fleet, fleet.client() as client:
        out.print(f"\n[bold]{escape(prompt)}[/]", end="")  # the answer goes on where the prompt ends
        request = pb.GenerateRequest(
            text=prompt,
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
        )
        summary = stream_answer(client, request, 60.0)
        out.print()
        if summary is not None:
            print_waterfall(out, summary)
            if not summary.kv_transfer.bytes:
                raise ConfigError("no KV moved between prefill and decode: this is a bug")
        out.print(f"\n{time.monotonic() - began:.1f} s from start to last token. Now: [bold].venv/bin/splitfire up pico[/]")


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def router(context: typer.Context) -> None:
    """One router process; --help lists its flags."""
    _become("router", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def prefill(context: typer.Context) -> None:
    """One prefill worker; --help lists its flags."""
    _become("splitfire.worker", ["--role=prefill", *context.args])


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def decode(context: typer.Context) -> None:
    """One decode worker; --help lists its flags."""
    _become("splitfire.worker", ["--role=decode", *context.args])


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def simulate(context: typer.Context) -> None:
    """Serves a trace with the router's own rules over workers that are formulas; --help lists its flags."""
    _become("router.simulation", ["simulate", *context.args])


def make_plan(
    model: str, num_prefill: int, num_decode: int, port: int, prefill_cpus: str, decode_cpus: str,
    *, router_flags: tuple[str, ...], worker_flags: tuple[str, ...], shared_flags: tuple[str, ...], num_routers: int = 1,
) -> FleetPlan:  # fmt: skip
    try:
        cpus = parse_cpus(prefill_cpus), parse_cpus(decode_cpus)
    except ValueError as exc:
        raise ConfigError(f"--prefill-cpus, --decode-cpus: {exc}") from exc
    if not any(cpus):
        cpus = default_cpus(num_prefill, num_decode)
    path = resolve_model(model)  # once, here, where a download's progress can be seen
    ModelDir(path)  # refuses what no service could load, before any is started
    return FleetPlan(
        str(path),
        served_name(model, path),
        num_prefill,
        num_decode,
        *cpus,
        port or free_port(),
        router_flags,
        worker_flags,
        shared_flags,
        num_routers,
    )


def given(flags: Mapping[str, object | None]) -> tuple[str, ...]:
    """The flags that have a value, as a child process takes them."""
    return tuple(f"{name}={value}" for name, value in flags.items() if value is not None)


@contextmanager
def running(plan: FleetPlan) -> Iterator[Fleet]:
    """A fleet that is ready; whatever happens inside, nothing of it is left afterwards."""
    fleet = Fleet(plan, lambda line: err.print(f"[yellow]{escape(line)}[/]"))

    def ended(number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)
    try:
        fleet.start()
        with err.status(f"starting {plan.num_prefill} prefill and {plan.num_decode} decode workers with {plan.model_name}"):
            status = fleet.wait_ready()
        print_ready(fleet, status)
        yield fleet
    except KeyboardInterrupt:
        err.print("ending the fleet")
        raise typer.Exit(130) from None
    finally:
        _stop(fleet)


def print_ready(fleet: Fleet, status: pb.GetFleetResponse) -> None:
    routers = f", {fleet.plan.num_routers} processes" if fleet.plan.num_routers > 1 else ""
    out.print(f"router     ready  {fleet.address}{routers}")
    pairs: dict[str, list[pb.Pair]] = {}
    for pair in status.pairs:
        pairs.setdefault(pair.decode_worker_id, []).append(pair)
    for worker in sorted(status.workers, key=lambda w: (w.role, w.worker_id)):
        line = f"{worker.worker_id:<10} ready  {worker.total_blocks} KV blocks of {worker.block_size} tokens, {worker.kv_dtype}"
        for pair in pairs.get(worker.worker_id, ()):
            line += f"; from {pair.prefill_worker_id}: {pair.transport} over {pair.path}, {pair.bytes_per_s / 1e9:.1f} GB/s"
        out.print(line)


def stream_answer(
    client: Client, request: pb.GenerateRequest, timeout_s: float, answer: list[str] | None = None
) -> pb.Summary | None:
    """Prints the text as it comes; the summary at the end."""
    summary = None
    for response in client.generate(request, timeout_s):
        if response.text:
            sys.stdout.write(response.text)
            sys.stdout.flush()
            if answer is not None:
                answer.append(response.text)
        if response.HasField("summary"):
            summary = response.summary
    sys.stdout.write("\n")
    sys.stdout.flush()
    return summary


def _ask() -> str:
    try:
        return out.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _stop(fleet: Fleet) -> None:
    """A second Ctrl-C does not wait for anything."""
    try:
        fleet.stop()
    except KeyboardInterrupt:
        fleet.stop(now=True)


def _become(module: str, arguments: list[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606


def main() -> None:
    try:
        sys.exit(app(standalone_mode=False) or 0)  # a typer.Exit comes back as its code
    except ConfigError as exc:
        sys.exit(exit_with(exc))
    except ServerError as exc:
        err.print(f"splitfire: {one_line(str(exc))}", markup=False)
        sys.exit(1)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer._click.exceptions.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
