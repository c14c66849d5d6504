"""In which order a load is given, and what of it is asked of each fleet; and the command around it, without any fleet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from splitfire.cli.bench import facts
from splitfire.cli.bench import sweep as sweeping
from splitfire.cli.bench.arrivals import Planned, Shape, Window
from splitfire.cli.bench.command import describe, results_of
from splitfire.cli.bench.flags import Lengths
from splitfire.cli.bench.run import Result, Target
from splitfire.cli.bench.statistics import Client, Outcome
from splitfire.cli.bench.sweep import Load, Sweep
from splitfire.cli.bench.targets import Subject, Variants
from splitfire.core.errors import ConfigError
from splitfire.core.workload_trace import Arrival, Trace
from splitfire.v1 import inference_pb2 as pb
from tests.cli.bench.samples import SLO, outcome

LOAD = Load((1.0, 2.0), 2, Window(0.0, 5.0), Shape(Lengths(10, 10), Lengths(2, 2)), 0, None, SLO, 0, 5.0)
CARRIES = {"split": 8.0, "aggregated": 2.0}  # requests a second; beyond it all are late


class FakeRun:
    """Instead of sending anything. `log`: (address, number of requests, their messages)."""

    log: list[tuple[str, list[bytes]]] = []  # noqa: RUF012
    cut_after = 1000

    def __init__(self, target: Target, requests: list[tuple[Planned, bytes]], window: Window, *_: object) -> None:
        self._target, self._requests, self._window = target, requests, window

    async def __call__(self) -> Result:
        FakeRun.log.append((self._target.address, [message for _, message in self._requests]))
        rate = len(self._requests) / self._window.duration_s
        is_late = rate > CARRIES[self._target.address]
        found: list[Outcome] = [outcome(9.0 if is_late else 0.1) for _ in self._requests]
        is_cut = len(FakeRun.log) >= FakeRun.cut_after
        return Result(0.0, self._window.duration_s, found, Client(), 0, is_cut)


@pytest.fixture(autouse=True)
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "Run", FakeRun)
    monkeypatch.setattr(FakeRun, "log", [])
    monkeypatch.setattr(FakeRun, "cut_after", 1000)


def variants(context: int = 100) -> Variants:
    def opened(name: str) -> object:
        @contextmanager
        def open_one() -> Iterator[Subject]:
            yield Subject(Target(name), pb.Model(id="m", context_length=context, vocab_size=50), f"workers of {name}")

        return open_one

    return {name: opened(name) for name in CARRIES}  # type: ignore[misc]


def swept(load: Load, context: int = 100) -> Sweep:
    sweep = Sweep(load, variants(context), lambda _: None, lambda _: None, [])
    sweep()
    return sweep


def ran(sweep: Sweep) -> list[tuple[int, str, float]]:
    return [(cell.turn, cell.variant, cell.rate) for cell in sweep.cells]


def test_variants_take_turns_and_each_begins_once() -> None:
    assert ran(swept(LOAD)) == [
        (0, "split", 1.0), (0, "split", 2.0), (0, "aggregated", 1.0), (0, "aggregated", 2.0),
        (1, "aggregated", 1.0), (1, "aggregated", 2.0), (1, "split", 1.0), (1, "split", 2.0),
    ]  # fmt: skip


def test_every_variant_gets_the_same_requests_and_every_round_others() -> None:
    sweep = swept(LOAD)
    messages = {(cell.turn, cell.variant, cell.rate): sent for cell, (_, sent) in zip(sweep.cells, FakeRun.log, strict=True)}
    assert messages[0, "split", 2.0] == messages[0, "aggregated", 2.0]
    assert not {*messages[0, "split", 2.0]} & {*messages[1, "split", 2.0]}
    assert not {*messages[0, "split", 1.0]} & {*messages[0, "split", 2.0]}
    request = pb.GenerateRequest.FromString(messages[0, "split", 1.0][0])
    assert (len(request.prompt_token_ids), request.stopping.max_tokens, request.stopping.ignore_eos) == (10, 2, True)


def test_auto_goes_as_far_as_each_carries_and_then_all_get_all_rates() -> None:
    sweep = swept(replace(LOAD, rates=()))
    first = [(variant, rate) for turn, variant, rate in ran(sweep) if turn == 0]
    assert first == [*(("split", rate) for rate in (1, 2, 4, 8, 16)), *(("aggregated", rate) for rate in (1, 2, 4))]
    second = [(variant, rate) for turn, variant, rate in ran(sweep) if turn == 1]
    assert second == [(variant, rate) for variant in ("aggregated", "split") for rate in (1, 2, 4, 8, 16)]


def test_ctrl_c_ends_it_and_what_there_is_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "cut_after", 3)
    sweep = swept(LOAD)
    assert (len(sweep.cells), sweep.is_cut) == (3, True)
    found = results_of(sweep, {"command": "c"})
    assert "ended before it was complete" in found.notes[-1]
    assert found.model == "m"
    assert found.head == {"command": "c", "workers, split": "workers of split", "workers, aggregated": "workers of aggregated"}


def test_ctrl_c_while_a_fleet_starts_is_no_error() -> None:
    def interrupted() -> object:
        raise KeyboardInterrupt

    sweep = Sweep(LOAD, {"split": interrupted}, lambda _: None, lambda _: None, [])  # type: ignore[dict-item]
    sweep()
    assert (sweep.cells, sweep.is_cut) == ([], True)
    assert results_of(sweep, {}).model == "nothing"


def test_what_the_model_cannot_take_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"--prompt-tokens and --output-tokens: is '10 and 2', accepted: at most 11 together"):
        swept(LOAD, context=11)
    assert len(swept(LOAD, context=12).cells) == 8


def test_a_trace_is_cut_to_what_the_model_takes_and_the_report_says_so() -> None:
    trace = Trace("t.jsonl", 512, [Arrival(float(i), 5000 if i % 2 else 50, 4, ()) for i in range(10)])
    sweep = swept(replace(LOAD, rates=(1.0,), rounds=1, trace=trace))
    assert "split at 1: 2 of 5 requests were cut to the model's context of 100 tokens" in sweep.notes
    assert {len(pb.GenerateRequest.FromString(message).prompt_token_ids) for message in FakeRun.log[0][1]} == {50, 96}
    assert describe(sweep.load).startswith("10 requests of t.jsonl, 1/s as recorded; rates 1; ")


def test_more_prompts_than_are_kept_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "MAX_PROMPT_TOKENS", 49)
    with pytest.raises(ConfigError, match="50 tokens of prompts in one run, at most 49 are kept"):
        swept(LOAD)


def test_the_load_is_told_in_a_line() -> None:
    load = replace(LOAD, shared_prefix=4, rates=())
    assert describe(load) == (
        "prompts of 10 tokens, 4 of them shared, answers of 2, Poisson arrivals; rates doubled until goodput fell; "
        "5 s each after 0 s of warm-up; 2 rounds; seed 0"
    )


def test_facts_are_lines_and_name_no_files() -> None:
    for text in (facts.machine(), facts.versions(), facts.now()):
        assert text and "\n" not in text
    settings = facts.worker_settings({"SPLITFIRE_DTYPE": "fp32", "SPLITFIRE_FLEET_TOKEN_FILE": "/secret", "SPLITFIRE_HOST": "x"})
    assert settings == "SPLITFIRE_DTYPE=fp32"
