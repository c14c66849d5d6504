"""What is advised, from a profile that was made up, and what the commands say of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from router.costs import PromptCost
from router.simulation.__main__ import app
from router.simulation.advice import Mix, Targets, advise, capacity
from router.simulation.engine import Engine, StepCost
from router.simulation.profile import fit, read_profile
from splitfire.core.errors import ConfigError

ENGINE = Engine(PromptCost(0.001, 2e-4, 0.0), StepCost(0.01), 1000, 16, chunk_tokens=256, block_bytes=1)
PROFILE = {
    "model": "made-up",
    "prompts": [{"tokens": tokens, "seconds": 0.004 + 1e-4 * tokens + 1e-8 * tokens * tokens} for tokens in (100, 500, 2000)],
    "steps": [
        {"streams": streams, "context": context, "seconds": 0.003 + 2e-4 * streams + 1e-7 * streams * context}
        for streams, context in ((1, 80), (4, 80), (16, 80), (1, 2000))
    ],
    "overhead_s": 0.002,
    "num_blocks": 500,
    "block_size": 32,
    "block_bytes": 100_000,
    "bytes_per_s": 5e9,
    "chunk_tokens": 256,
}


def test_the_capacity_is_what_the_workers_have_time_for() -> None:
    """1000 blocks of 16 hold 40 requests of 400 tokens: 0.061 s for a prompt, 99 tokens at 10 ms for 40."""
    assert capacity(ENGINE, 2, Mix(300, 100)) == pytest.approx(2 / (0.061 + 99 * 0.01 / 40))


def test_long_prompts_that_disturb_are_split_off_and_an_idle_fleet_is_not() -> None:
    mix = Mix(1500, 60)
    strict = advise(ENGINE, 3, mix, [1.5], Targets(ttft_p90=1.2, itl_p99=0.02), 300)[0]
    assert strict.choice.num_prefill > 0
    assert strict.choice.badness(strict.targets) <= 1 < strict.aggregated.badness(strict.targets)
    assert "split 1:2" in strict.sentence() or "split 2:1" in strict.sentence()
    lenient = advise(ENGINE, 3, Mix(20, 60), [0.5], Targets(ttft_p90=1.2, itl_p99=0.2), 300)[0]
    assert lenient.choice is lenient.aggregated
    assert "do not split" in lenient.sentence()


def test_a_profile_becomes_the_engine_it_was_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    engine = read_profile(path).engine()
    assert engine.prompt.base_s == pytest.approx(0.004)
    assert engine.prompt.token_s == pytest.approx(1e-4)
    assert engine.prompt.pair_s == pytest.approx(2e-8)
    assert engine.step.seconds(8, 8000) == pytest.approx(0.003 + 8 * 2e-4 + 8e-4)


def test_a_fit_never_predicts_less_than_nothing() -> None:
    """Three points bent the wrong way: no coefficient goes below zero, and none is off by half."""
    rows = [(1.0, x, x * x) for x in (100.0, 400.0, 1000.0)]
    theta = fit(rows, [0.02, 0.06, 0.11])
    assert min(theta) >= 0
    for row, seconds in zip(rows, (0.02, 0.06, 0.11), strict=True):
        assert sum(a * b for a, b in zip(theta, row, strict=True)) == pytest.approx(seconds, rel=0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": []}, "prompts: expected a list of 1 to 64 objects"),
        ({"prompts": [{"tokens": 5, "seconds": 0}]}, "seconds: 0"),
        ({"steps": [3]}, "steps: expected a list of 1 to 64 objects"),
        ({"block_size": 0}, "block_size: 0, expected a number from 1 to 4096"),
        ({"bytes_per_s": float("inf")}, "bytes_per_s: Infinity"),
        ({"num_blocks": None}, "num_blocks: null"),
    ],
)
def test_a_profile_that_is_none_is_refused_in_one_line(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**PROFILE, **change}))
    with pytest.raises(ConfigError) as caught:
        read_profile(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "nothing"], "'nothing': neither w8, conversation, toolagent nor a file"),
        (["simulate", "w8", "--policy", "best"], "--policy: 'best', expected one of cost,"),
        (["simulate", "w8", "--prefill", "4"], "--prefill: 4 of 4 workers"),
        (["advise", "--profile", "none.json"], "none.json: No such file"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], says: str) -> None:
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, ConfigError)  # main() makes exit code 2 of it
    assert says in str(outcome.exception) and "\n" not in str(outcome.exception)


def test_a_simulation_prints_a_table_and_writes_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    outcome = CliRunner().invoke(app, ["simulate", "w8", "--policy", "cost", "--policy", "oracle", "--json", str(path)])
    assert outcome.exit_code == 0, outcome.output
    assert "oracle" in outcome.output
    assert json.loads(path.read_text())["results"]["cost"]["hit_rate"] > 0.6
