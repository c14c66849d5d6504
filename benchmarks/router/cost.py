"""Processor time of a router for one request, beside sglang-router's and vllm-router's in the same run, and what ours is made of.

They relay HTTP in Rust and neither tokenize nor hash; ours speaks gRPC to both sides, in Python. The same text, the same number
of tokens, clients of the same kind, workers that answer at once.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable

from tokenizers import Tokenizer

from benchmarks.opponents.server import ServerFailed
from benchmarks.report import Row, half_spread
from benchmarks.router.engine import Speed
from benchmarks.router.fake_worker import FleetShape
from benchmarks.router.load import Ask, text_of
from benchmarks.router.others import SGLANG, VLLM, Other, other
from benchmarks.router.rig import MODEL, Rig, rig
from benchmarks.router.runs import WARM_UP_S, Loop, Run
from splitfire.core.hashing import chain_root, hash_blocks

STREAMS = 32
TOKENS_A_MESSAGE = 8
ASKS = {"1 token": Ask(300, 0, 1), "16 tokens, 8 a message": Ask(300, 0, 16)}
SPEED = Speed(tokens_per_step=TOKENS_A_MESSAGE)


def cost(turns: int, seconds: float) -> list[Row]:
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(rig(flags=("--max-requests=4096",)))
        bare = stack.enter_context(rig(is_bare=True))
        others = []
        for name in (SGLANG, VLLM):
            try:
                others.append(stack.enter_context(other(name, SPEED, 32, 2, "round_robin")))
            except ServerFailed as exc:
                rows.append(Row("processor time a request", f"skipped: {exc}", "", 0.0, None, name, None, "", None, 0.0))
        for case, ask in ASKS.items():
            taken: dict[str, list[float]] = {}
            for _ in range(turns):
                for name, run in _runs(ours, bare, others, ask, seconds).items():
                    taken.setdefault(name, []).append(run().cpu_us_a_request)
            rows += _rows(case, taken)
    return rows + _parts()


def _runs(ours: Rig, bare: Rig, others: list[Other], ask: Ask, seconds: float) -> dict[str, Callable[[], Run]]:
    loop = Loop(FleetShape(2, 2, SPEED), ask, STREAMS, seconds)
    runs: dict[str, Callable[[], Run]] = {"router": lambda: loop.run(ours), "bare relay": lambda: loop.run(bare)}
    for one in others:
        runs[one.name] = lambda one=one: _relayed(one, ask, seconds)  # type: ignore[misc]
    return runs


def _relayed(one: Other, ask: Ask, seconds: float) -> Run:
    one.clients.do("closed", ask, STREAMS, WARM_UP_S, 0)
    cpu, began = one.server.cpu_s(), time.perf_counter()
    answers = one.clients.do("closed", ask, STREAMS, seconds, 1)
    return Run(answers, time.perf_counter() - began, one.server.cpu_s() - cpu).check()


def _rows(case: str, taken: dict[str, list[float]]) -> list[Row]:
    ours = taken.pop("router")
    rows = []
    for name, theirs in taken.items():
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        value, other = statistics.median(ours), statistics.median(theirs)
        rows.append(Row(case, "processor time a request", "us", value, other, name, ratio, "", None, half_spread(ours)))
    return rows


def _parts(count: int = 300) -> list[Row]:
    """What can be timed by itself; the bare relay's row is what gRPC takes, and the rest is the router's Python."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    draw = random.Random(0)
    texts = [text_of(draw, 300) for _ in range(count)]
    prompts = [tokenizer.encode(text).ids for text in texts]
    root = chain_root(b"", b"", "")
    parts = {
        "tokenizing 300 bytes": lambda: [tokenizer.encode(text).ids for text in texts],
        "hashing their blocks": lambda: [hash_blocks(root, prompt, 32) for prompt in prompts],
    }
    return [Row("of ours", name, "us", _best_us(run, count), None, "", None, "", None, 0.0) for name, run in parts.items()]


def _best_us(run: Callable[[], object], count: int) -> float:
    """The quietest of several, a call."""
    times = []
    for _ in range(7):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return 1e6 * min(times) / count
