"""`splitfire up` and `splitfire demo`: a fleet on this machine."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from splitfire.cli.ask import stream_answer
from splitfire.cli.render import print_waterfall
from splitfire.cli.supervisor import Fleet, FleetPlan, default_cpus, free_port
from splitfire.core.errors import ConfigError
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model, served_name
from splitfire.core.values import parse_cpus
from splitfire.v1 import inference_pb2 as pb

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
LOOK_S = 0.2
ENDING = (signal.SIGINT, signal.SIGTERM)
DEMO_PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x"


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
    files_dir: Annotated[Path | None, typer.Option(envvar="SPLITFIRE_FILES_DIR", help="of OpenAI's files and batches")] = None,
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
    router_flags["--files-dir"] = files_dir.absolute() if files_dir else None
    shared = {"--max-context": max_context, "--trace-file": trace_file.absolute() if trace_file else None}
    fleet_plan = make_plan(
        model, 0 if aggregated else prefill, decode, port, prefill_cpus, decode_cpus,
        router_flags=given(router_flags), worker_flags=given(flags), shared_flags=given(shared), num_routers=routers,
    )  # fmt: skip
    with running(fleet_plan) as fleet:
        out.print(
            f"\nTry it:  [bold]splitfire generate 'def fibonacci(n):' --server {fleet.address}[/]\n"
            f"OpenAI's clients:  http://127.0.0.1:{http_port}/v1; in a browser: http://127.0.0.1:{http_port}/\n"
            f"(logs: {fleet.directory}; Ctrl-C ends it)"
        )
        with asked_to_end() as is_asked:
            while not is_asked():
                time.sleep(LOOK_S)
                fleet.watch()
        err.print("ending the fleet")


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

    for number in ENDING:  # also SIGINT: a shell makes it ignored by what it starts in the background
        signal.signal(number, ended)
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


@contextmanager
def asked_to_end() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came while inside. Nothing is raised: an exception while a child is looked at could leave a lock of
    `subprocess` taken for ever."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda got, _frame: asked.append(got)) for number in ENDING}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _stop(fleet: Fleet) -> None:
    """A second Ctrl-C does not wait for anything."""
    try:
        fleet.stop()
    except KeyboardInterrupt:
        fleet.stop(now=True)
