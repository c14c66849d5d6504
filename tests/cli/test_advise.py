"""What `splitfire advise` measures, and that the simulation can read it."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import pytest

from router.simulation.profile import read_profile
from splitfire.cli.advise import Answer, Profile, beside, save, step_s
from splitfire.core.errors import ConfigError
from splitfire.v1 import inference_pb2 as pb


def test_the_simulation_reads_what_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    prompts = [{"tokens": tokens, "seconds": 0.001 + 1e-4 * tokens} for tokens in (100, 400, 800)]
    steps = [{"streams": streams, "context": 80, "seconds": 0.002 + 1e-3 * streams} for streams in (1, 4, 16)]
    save(Profile("m", prompts, steps, 0.001, 100, 32, 98304, 1e9, 256, 1.2, 1.5), path)
    engine = read_profile(path).engine()
    assert engine.prompt.seconds(200) == pytest.approx(0.021)
    assert engine.step.seconds(8, 8 * 80) == pytest.approx(0.010)
    assert (engine.prompt_beside, engine.step_beside) == (1.2, 1.5)
    with pytest.raises(ConfigError, match="--profile: nowhere cannot be written"):
        save(Profile("m", prompts, steps, 0.001, 100, 32, 98304, 1e9, 256, 1.2, 1.5), tmp_path / "none" / "nowhere")


def test_a_step_is_timed_while_all_streams_run() -> None:
    """Tokens come every 10 ms, and every 2 ms while a stream is alone."""
    alone = [0.002 * i for i in range(10)]
    both = [0.02 + 0.01 * i for i in range(20)]
    times = {0: [*alone, *both], 1: [*both, *(0.212 + 0.002 * i for i in range(10))]}
    number = count()
    assert step_s(lambda _prompt, _output: Answer(0.0, times[next(number)], pb.Summary()), 2, 32) == pytest.approx(0.01)


def test_streams_that_never_ran_together_are_not_timed() -> None:
    times = {0: [0.0, 0.1], 1: [0.2, 0.3]}
    number = count()
    with pytest.raises(ConfigError, match="2 streams never ran together"):
        step_s(lambda _prompt, _output: Answer(0.0, times[next(number)], pb.Summary()), 2, 32)


def test_what_prompts_and_steps_take_beside_one_another_is_timed_together() -> None:
    """Steps of 20 ms while prompts are computed, 10 ms before and after."""

    def ask(num_prompt: int, num_output: int) -> Answer:
        now = time.monotonic()
        if num_output > 1:
            time.sleep(0.5)
            return Answer(now, [now - 0.1, *(now + 0.02 * i for i in range(1, 25)), now + 9.0, now + 9.01], pb.Summary())
        time.sleep(0.025)
        return Answer(now, [now], pb.Summary(phases=[pb.Phase(name="prefill", duration_s=0.06 if num_prompt == 1000 else 0.016)]))

    prompt, step = beside(ask, {1000: 0.05, 100: 0.01}, 0.01)
    assert prompt == pytest.approx(1.4), "the mean of 1.2 and 1.6: each counts by its ratio, however long it is"
    assert step == pytest.approx(2.0, rel=0.1)
