"""`splitfire advise`: measures a fleet through its public API, and has it simulated (`python -m router.simulation advise`).

What prompts of three lengths take, what a step takes with 1, 4 and 16 streams and with a long context, how fast a pair moves KV: a
profile, which can be kept. Nothing else should use the fleet meanwhile.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from splitfire.cli.client import Client, connect
from splitfire.cli.options import API_KEY_FILE, TLS_CA
from splitfire.cli.supervisor import Fleet, FleetPlan, default_cpus, free_port
from splitfire.core.errors import ConfigError
from splitfire.core.model_source import resolve_model, served_name
from splitfire.v1 import inference_pb2 as pb

BESIDE = 4  # streams that run while prompts are computed
STREAMS = (1, 4, 16)  # after short prompts; and one after a long one
STEP_TOKENS, STEP_PROMPT = 96, 32
MORE_TOKENS = 24  # for each further stream: the first goes on until the last has begun
LONGEST_PROMPT = 2048
REPEATS = 5
TIMEOUT_S = 300.0
FIRST_ORDINARY_ID = 16
CHUNK_TOKENS = 256  # of a worker on a CPU; a worker does not tell
UNKNOWN_BYTES_PER_S = 1e9


OWN_FLEET = ("--split=always",)


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured; router/simulation/profile.py says what each means."""

    model: str
    prompts: Sequence[dict[str, float]]
    steps: Sequence[dict[str, float]]
    overhead_s: float
    num_blocks: int
    block_size: int
    block_bytes: int
    bytes_per_s: float
    chunk_tokens: int
    prompt_beside: float
    step_beside: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream, by this process's clock."""

    sent_at: float
    token_times: Sequence[float]
    summary: pb.Summary

    @property
    def prefill_s(self) -> float:
        return sum(phase.duration_s for phase in self.summary.phases if phase.name == "prefill")


def advise(
    model: Annotated[str, typer.Argument(envvar="SPLITFIRE_MODEL", help="what to measure, in a fleet of its own")] = "pico",
    server: Annotated[
        str | None, typer.Option(envvar="SPLITFIRE_SERVER", help="host:port of a router: measures its fleet instead")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(envvar="SPLITFIRE_ADVISE_PROFILE", help="file: what was measured before, or where to keep it")
    ] = None,
    workers: Annotated[int, typer.Option(envvar="SPLITFIRE_ADVISE_WORKERS", min=2, max=64, help="to divide")] = 4,
    prompt: Annotated[int, typer.Option(envvar="SPLITFIRE_ADVISE_PROMPT", min=1, help="tokens of a prompt, at the mean")] = 400,
    output: Annotated[int, typer.Option(envvar="SPLITFIRE_ADVISE_OUTPUT", min=2, help="tokens of an answer, at the mean")] = 120,
    rate: Annotated[
        list[float] | None, typer.Option(envvar="SPLITFIRE_ADVISE_RATE", help="requests a second; default: several loads")
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(envvar="SPLITFIRE_ADVISE_TTFT", help="target for the p90 of times to first token, in seconds")
    ] = None,
    itl: Annotated[
        float | None, typer.Option(envvar="SPLITFIRE_ADVISE_ITL", help="target for the p99 of gaps between tokens, in seconds")
    ] = None,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Measures, simulates, and says: split or not, in which ratio of prefill to decode workers, and when not."""
    options = [f"--workers={workers}", f"--prompt={prompt}", f"--output={output}", *(f"--rate={each}" for each in rate or ())]
    options += [f"--{name}={value}" for name, value in (("ttft", ttft), ("itl", itl)) if value is not None]
    if profile is not None and profile.exists():
        raise typer.Exit(_simulate(profile, options))
    if server is not None:
        with connect(server, api_key_file, tls_ca) as client:
            measured = measure(client)
    else:
        with _own_fleet(model) as client:
            measured = measure(client)
    with tempfile.TemporaryDirectory() as directory:
        path = profile or Path(directory) / "profile.json"
        save(measured, path)
        raise typer.Exit(_simulate(path, options))


@contextmanager
def _own_fleet(model: str) -> Iterator[Client]:
    """One worker of each role; nothing of it is left afterwards."""
    path = resolve_model(model)
    plan = FleetPlan(str(path), served_name(model, path), 1, 1, *default_cpus(1, 1), free_port(), router_flags=OWN_FLEET)
    console = Console(stderr=True)
    fleet = Fleet(plan, console.print)
    try:
        with console.status(f"starting and measuring {plan.model_name}"):
            fleet.start()
            fleet.wait_ready()
            with fleet.client() as client:
                yield client
    finally:
        fleet.stop()


def measure(client: Client) -> Profile:
    """About half a minute on a CPU."""
    draw = random.Random(time.monotonic())  # nothing of it is in a cache, however often this is done
    model = client.model()

    def ask(num_tokens: int, num_output: int) -> Answer:
        return stream(client, [draw.randrange(FIRST_ORDINARY_ID, model.vocab_size) for _ in range(num_tokens)], num_output)

    longest = min(LONGEST_PROMPT, model.context_length) - 2
    ask(longest, 2)  # the first of a kind is slow
    by_length = {longest // part: [ask(longest // part, 2) for _ in range(REPEATS)] for part in (8, 2, 1)}
    ask(STEP_PROMPT, STEP_TOKENS)
    cases = [*((count, STEP_PROMPT) for count in STREAMS), (1, longest - STEP_TOKENS)]
    steps = [
        {"streams": count, "context": tokens + _num_output(count) // 2, "seconds": step_s(ask, count, tokens)}
        for count, tokens in cases
    ]
    alone_s = {length: statistics.fmean(a.prefill_s for a in by_length[length]) for length in (longest // 8, longest // 2)}
    prompt_beside, step_beside = beside(ask, alone_s, float(steps[STREAMS.index(BESIDE)]["seconds"]))
    fleet = client.fleet()
    answers = [answer for some in by_length.values() for answer in some]
    decode = next(worker for worker in fleet.workers if worker.role == pb.ROLE_DECODE)
    moved = [answer.summary.kv_transfer for answer in answers if answer.summary.kv_transfer.blocks]
    return Profile(
        model=model.id,
        prompts=[
            {"tokens": length, "seconds": statistics.median(answer.prefill_s for answer in some)}
            for length, some in by_length.items()
        ],
        steps=steps,
        overhead_s=max(0.0, statistics.median(a.token_times[0] - a.sent_at - a.prefill_s for a in answers)),
        num_blocks=decode.total_blocks,
        block_size=decode.block_size,
        block_bytes=max((transfer.bytes // transfer.blocks for transfer in moved), default=1),
        bytes_per_s=statistics.median(pair.bytes_per_s for pair in fleet.pairs) if fleet.pairs else UNKNOWN_BYTES_PER_S,
        chunk_tokens=CHUNK_TOKENS,
        prompt_beside=prompt_beside,
        step_beside=step_beside,
    )


def stream(client: Client, prompt: Sequence[int], num_output: int) -> Answer:
    """Greedy, exactly so many tokens."""
    request = pb.GenerateRequest(
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingParams(max_tokens=num_output, ignore_eos=True),
    )
    sent_at, times, summary = time.monotonic(), list[float](), pb.Summary()
    for response in client.generate(request, TIMEOUT_S):
        times += [time.monotonic()] * len(response.token_ids)
        if response.HasField("summary"):
            summary = response.summary
    return Answer(sent_at, times, summary)


def step_s(ask: Callable[[int, int], Answer], num_streams: int, num_prompt: int) -> float:
    """Between two tokens of a stream while all of them run."""
    with ThreadPoolExecutor(num_streams) as pool:
        answers = list(pool.map(lambda _: ask(num_prompt, _num_output(num_streams)), range(num_streams)))
    begin, end = max(answer.token_times[0] for answer in answers), min(answer.token_times[-1] for answer in answers)
    spans = []
    for answer in answers:
        inside = [at for at in answer.token_times if begin <= at <= end]
        if len(inside) > 1:
            spans.append((inside[-1] - inside[0]) / (len(inside) - 1))
    if not spans:
        raise ConfigError(f"{num_streams} streams never ran together; is somebody else using the fleet?")
    return statistics.median(spans)


def beside(ask: Callable[[int, int], Answer], alone_s: Mapping[int, float], step_alone_s: float) -> tuple[float, float]:
    """How much longer prompts of these lengths take while BESIDE streams run, and their steps while prompts are computed one after
    another; at least 1. Means: two processors may be halves of one for a moment and not for the next."""
    num_tokens = min(LONGEST_PROMPT - 2 * STEP_PROMPT, MORE_TOKENS + int(2 * REPEATS * sum(alone_s.values()) / step_alone_s))
    with ThreadPoolExecutor(BESIDE) as pool:
        streams = [pool.submit(ask, STEP_PROMPT, num_tokens) for _ in range(BESIDE)]
        began = time.monotonic()
        beside_s = [ask(length, 1).prefill_s for _ in range(REPEATS) for length in alone_s]
        ended = time.monotonic()
        spans = []
        for answer in (stream.result() for stream in streams):
            inside = [at for at in answer.token_times if began <= at <= ended]
            if len(inside) > 1:
                spans.append((inside[-1] - inside[0]) / (len(inside) - 1))
    prompt_ratio = statistics.fmean(took / alone for took, alone in zip(beside_s, REPEATS * [*alone_s.values()], strict=True))
    return max(1.0, prompt_ratio), max(1.0, statistics.median(spans) / step_alone_s) if spans else 1.0


def _num_output(num_streams: int) -> int:
    return STEP_TOKENS + MORE_TOKENS * (num_streams - 1)


def save(profile: Profile, path: Path) -> None:
    try:
        path.write_text(json.dumps(asdict(profile), indent=1) + "\n")
    except OSError as exc:
        raise ConfigError(f"--profile: {path.name} cannot be written: {exc.strerror or exc}") from exc


def _simulate(profile: Path, options: Sequence[str]) -> int:
    """Its exit code; it prints what it advises."""
    command = [sys.executable, "-m", "router.simulation", "advise", f"--profile={profile}", *options]
    return subprocess.run(command, check=False).returncode  # noqa: S603
