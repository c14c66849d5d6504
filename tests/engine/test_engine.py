"""The engine alone: failures stay with their sequence, tokens do not depend on company, resume continues."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from splitfire.core.sampling import SamplingParams
from splitfire.engine import drawing
from splitfire.engine.blocks import BlockState
from splitfire.engine.kernels.sample import Draw, SampledToken, SampleRow, sample
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.sequence import Purpose
from tests.checkpoints import PICO as PICO_DIR
from tests.checkpoints import VOCAB, assert_greedy, family_configs, pico_oracle, save_checkpoint
from tests.engines import assert_no_leaks, drain, load_model, make_engine, make_spec, tokens_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return load_model(path)


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{seed}-{length}")
    return [draw.randrange(VOCAB) for _ in range(length)]


def test_pico_equals_transformers() -> None:
    engine = make_engine(load_model(PICO_DIR))
    specs = [make_spec(prompt(n), 16) for n in (1, 40, 300, 600)]
    for spec in specs:
        engine.add(spec)
    updates = drain(engine)
    for spec in specs:
        assert_greedy(pico_oracle(), spec.prompt, tokens_of(updates, spec))
    assert_no_leaks(engine)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, seed=3)], ids=["greedy", "sampled"]
)
def test_preemption_does_not_change_tokens(llama: Transformer, sampling: SamplingParams) -> None:
    roomy, tight = make_engine(llama, num_blocks=64), make_engine(llama, num_blocks=9)
    answers = []
    for engine in (roomy, tight):
        specs = [make_spec(prompt(60, i), 40, sampling=sampling) for i in range(4)]
        for spec in specs:
            engine.add(spec)
        updates = drain(engine)
        answers.append([tokens_of(updates, spec) for spec in specs])
        assert_no_leaks(engine)
    assert answers[0] == answers[1]
    assert tight._scheduler.num_preemptions > 0


def test_a_prefix_cache_changes_time_and_never_tokens(llama: Transformer) -> None:
    engine = make_engine(llama)
    first = make_spec(prompt(200), 8)
    engine.add(first)
    before = tokens_of(drain(engine), first)
    again = make_spec(prompt(200), 8)
    engine.add(again)
    updates = drain(engine)
    assert tokens_of(updates, again) == before
    assert next(u.num_cached for u in updates if u.tokens) == 192


def test_resume_continues_where_another_attempt_stopped(llama: Transformer) -> None:
    sampling = SamplingParams(temperature=1.0, seed=9, frequency_penalty=0.5)
    engine = make_engine(llama)
    whole = make_spec(prompt(50), 30, sampling=sampling)
    engine.add(whole)
    tokens = tokens_of(drain(engine), whole)
    for at in (1, 13, 29):
        rest = make_spec(prompt(50), 30, sampling=sampling, output=tokens[:at])
        engine.add(rest)
        assert tokens_of(drain(engine), rest) == tokens[at:]


def test_stop_tokens_and_min_tokens(llama: Transformer) -> None:
    engine = make_engine(llama)
    free = make_spec(prompt(20), 12)
    engine.add(free)
    tokens = tokens_of(drain(engine), free)
    stop = frozenset(tokens[3:4])
    at = tokens.index(tokens[3]) + 1
    stopping = make_spec(prompt(20), 12, stop=stop)
    engine.add(stopping)
    updates = drain(engine)
    assert tokens_of(updates, stopping) == tokens[:at]
    assert updates[-1].stopped
    patient = make_spec(prompt(20), 12, stop=stop, min_tokens=at + 2)
    engine.add(patient)
    longer = tokens_of(drain(engine), patient)
    assert len(longer) > at + 1
    assert not stop & set(longer[: at + 2])


def test_cancel_frees_blocks_whatever_the_state(llama: Transformer) -> None:
    engine = make_engine(llama, num_blocks=12, chunk_tokens=32)
    running, waiting = make_spec(prompt(100), 50), make_spec(prompt(300, 1), 5)
    held = make_spec(prompt(40, 2), 9, purpose=Purpose.PREFILL)
    for spec in (held, running, waiting):
        engine.add(spec)
    for _ in range(8):
        engine.step()
    for spec in (running, waiting, held, held):  # twice does no harm
        engine.finish(spec.seq_id)
    assert_no_leaks(engine)


def test_a_request_that_cannot_be_sampled_fails_alone(llama: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """F22: the exception of one row is that row's; its batch mates' tokens are what they were."""
    engine, sampling = make_engine(llama), SamplingParams(temperature=0.9, seed=5)
    mates = [make_spec(prompt(30, i), 10, sampling=sampling) for i in range(3)]
    for spec in mates:
        engine.add(spec)
    expected = [tokens_of(updates, spec) for updates in [drain(engine)] for spec in mates]

    def poisoned(logits: torch.Tensor, rows: list[SampleRow], draw: Draw) -> list[SampledToken]:
        if any(row.choice == 77 for row in rows):
            raise ZeroDivisionError("poison")
        return sample(logits, rows, draw)

    monkeypatch.setattr(drawing, "sample", poisoned)
    again = [make_spec(prompt(30, i), 10, sampling=sampling) for i in range(3)]
    poison = make_spec(prompt(33, 8), 10, choice=77, sampling=sampling)
    for spec in (again[0], poison, again[1], again[2]):
        engine.add(spec)
    updates = drain(engine)
    assert [tokens_of(updates, spec) for spec in again] == expected
    [failed] = [u for u in updates if u.error]
    assert failed.seq_id == poison.seq_id
    assert_no_leaks(engine)


def test_nan_logits_isolated(llama: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """F75: a row of NaN ends that sequence; the others go on unharmed."""
    engine = make_engine(llama)
    good = make_spec(prompt(30), 10)
    engine.add(good)
    expected = tokens_of(drain(engine), good)
    bad, again = make_spec([5, *prompt(30, 3)], 10), make_spec(prompt(30), 10)
    logits = llama.logits

    def sometimes_nan(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        if out.shape[0] == 2:
            out[1, 7] = float("nan")  # of `bad`: the other has less to compute, because part of it is cached
        return out

    monkeypatch.setattr(llama, "logits", sometimes_nan)
    engine.add(bad)
    engine.add(again)
    updates = drain(engine)
    assert [u.error for u in updates if u.seq_id == bad.seq_id and u.is_finished] == ["nonfinite_logits"]
    assert tokens_of(updates, again) == expected
    assert_no_leaks(engine)


def test_kv_of_a_sequence_that_is_not_finite_is_shared_with_nobody(llama: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama)
    logits = llama.logits
    monkeypatch.setattr(llama, "logits", lambda hidden: logits(hidden) * torch.nan)
    engine.add(make_spec(prompt(100), 5))
    updates = drain(engine)
    assert updates[-1].error == "nonfinite_logits"
    assert engine.blocks.counts()[BlockState.CACHED] == 0
    assert_no_leaks(engine)


def test_dynamic_rope_beyond_its_window_uses_the_configured_length(tmp_path: Path) -> None:
    """The base is fixed from the configured context, so keys written early stay valid; inside the window nothing changes."""
    from splitfire.core.model_config import RopeConfig
    from splitfire.engine.models.rope import rope_table

    config = RopeConfig("dynamic", 10000.0, factor=2.0, original_positions=1024)
    plain, cpu = RopeConfig("default", 10000.0), torch.device("cpu")
    inside, beyond = (rope_table(config, 64, length, cpu).inverse_frequencies for length in (1024, 4096))
    assert torch.equal(inside, rope_table(plain, 64, 1024, cpu).inverse_frequencies)
    theta = 10000.0 * (2.0 * 4 - 1) ** (64 / 62)
    torch.testing.assert_close(beyond, 1.0 / theta ** (torch.arange(0, 64, 2).float() / 64))
