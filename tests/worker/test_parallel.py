"""A worker of two ranks, which are processes: the same tokens, nothing left behind, and an end when one of them is gone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from splitfire.core.errors import ConfigError
from splitfire.core.flags import parse_settings
from splitfire.core.settings import WorkerSettings
from splitfire.engine.models.transformer import Weights
from splitfire.engine.parallel.followers import RankLost
from splitfire.engine.parallel.plan import RankPlan
from splitfire.worker import loading
from splitfire.worker.loading import LoadedModel, load_model
from tests.checkpoints import assert_greedy, family_configs, save_checkpoint
from tests.engines import answers_of, drain, make_spec

FLAGS = ("--dtype=fp32", "--threads=2", "--kv-memory=2MiB", "--max-context=512", "--speculate=off")
ENDS_WITHIN_S = 10.0


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def others() -> set[int]:
    """Processes that other tests left to this one's, a helper of the standard library for instance."""
    return {child.pid for child in psutil.Process().children()}


def started_since(others: set[int]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.pid not in others]


def load(path: Path, *flags: str) -> LoadedModel:
    return load_model(parse_settings(WorkerSettings, [f"--model={path}", *FLAGS, *flags], prog="test"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_two_ranks_answer_as_one_until_one_is_killed(tmp_path: Path, others: set[int]) -> None:
    oracle = save_checkpoint(family_configs()["qwen2"], tmp_path)
    before = descriptors()
    loaded = load(tmp_path, "--tensor-parallel=2")
    try:
        assert loaded.followers is not None
        [follower] = started_since(others)
        assert os.getpgid(follower.pid) != os.getpgid(0), "Ctrl-C is rank 0's to handle"
        engine, layout = loaded.engine, loaded.layout
        assert (layout.num_kv_heads, engine.runner.pool.layout.num_kv_heads) == (2, 1)
        assert engine.blocks.num_blocks == (2 << 20) // engine.runner.pool.layout.block_bytes, "kv_memory is a rank's"
        assert torch.get_num_threads() == 1, "two ranks share two threads"
        specs = [make_spec(range(begin, begin + 150), 8) for begin in (100, 900)]
        answers = answers_of(engine, specs)
        for spec in specs:
            assert_greedy(oracle, spec.prompt, answers[spec.seq_id])
        assert not loaded.followers.lost()

        follower.kill()
        engine.add(make_spec(range(50), 8))
        began = time.monotonic()
        with pytest.raises(RankLost, match="rank 1 ended with code -9"):
            drain(engine)
        assert time.monotonic() - began < ENDS_WITHIN_S
    finally:
        if loaded.followers is not None:
            loaded.followers.close()
    assert not started_since(others)
    del loaded, engine
    gc.collect()
    assert descriptors() <= before, "pools, channels and the meeting file"


def test_a_rank_that_ends_while_it_loads_ends_the_start(tmp_path: Path, others: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because it is killed; in life for lack of memory."""
    save_checkpoint(family_configs()["llama"], tmp_path)
    read = RankPlan.load

    def kill_and_read(*args: Any) -> Weights:
        for child in started_since(others):
            child.kill()
        return read(*args)

    monkeypatch.setattr(RankPlan, "load", kill_and_read)
    with pytest.raises(RankLost, match="rank 1 ended with code -9"):
        load(tmp_path, "--tensor-parallel=2")
    assert not started_since(others)


def test_when_rank_0_cannot_load_nobody_stays(tmp_path: Path, others: set[int]) -> None:
    model = save_checkpoint(family_configs()["llama"], tmp_path)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="NaN"):
        load(tmp_path, "--tensor-parallel=2")
    assert not started_since(others)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--tensor-parallel=0", "tensor_parallel .* greater than or equal to 1"),
        ("--tensor-parallel=9", "tensor_parallel .* less than or equal to 8"),
        ("--tensor-parallel=two", "tensor_parallel .* valid integer"),
        (
            "--tensor-parallel=3",
            "tensor_parallel is 3, which does not divide the model's num_attention_heads = 4; use a divisor of 2",
        ),
        ("--tensor-parallel=4", "tensor_parallel is 4, which does not divide the model's num_key_value_heads = 2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flag: str, says: str, tmp_path: Path, others: set[int]) -> None:
    save_checkpoint(family_configs()["llama"], tmp_path)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, flag)
    assert not started_since(others)


def test_more_ranks_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_parallel is 2, a CUDA device for each rank, and PyTorch sees 1"):
        load(tmp_path, "--device=cuda", "--tensor-parallel=2")


def test_memory_is_counted_for_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = save_checkpoint(family_configs()["llama"], tmp_path).config
    asked: list[tuple[int, int]] = []

    class Enough(Exception):
        pass

    def check(weights: int, pool: int, device: torch.device) -> None:
        asked.append((weights, pool))
        if len(asked) == 2:
            raise Enough

    monkeypatch.setattr(loading, "check_memory", check)
    load(tmp_path)
    with pytest.raises(Enough):
        load(tmp_path, "--tensor-parallel=2")
    embedding = 4 * config.vocab_size * config.hidden_size
    assert asked[1][0] == asked[0][0] + 2 * embedding, "each rank has its share, and counts the embedding whole"
    assert asked[0][1] - 8192 <= asked[1][1] // 2 <= asked[0][1], "and a pool of its own"
