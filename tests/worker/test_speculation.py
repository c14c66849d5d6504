"""Speculation in a worker: what it is given, what it refuses, what it measures, and the hand-off into it."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from splitfire.core.errors import ConfigError, InvalidInput
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.flags import parse_settings
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.settings import WorkerSettings
from splitfire.core.wire import sampling_to_wire, stopping_to_wire
from splitfire.engine.speculation.measure import DRAFT_SHAPES, SHAPES, measure_steps
from splitfire.v1 import fleet_pb2
from splitfire.worker.job import JobLimits, make_job
from splitfire.worker.loading import load_model as load_worker
from splitfire.worker.speculation import plan_draft_model
from tests.checkpoints import PICO, VOCAB, edit_config, family_configs, save_checkpoint
from tests.engine.speculation.rig import Always, make_draft_model, make_speculator
from tests.engines import GREEDY, drain, load_model, make_engine, make_spec, tokens_of
from tests.rig import Answer, Rig, play, until

PICO_DRAFT = PICO.parent / "pico-draft"
LAYOUT = KvLayout("int8", 6, 2, 64, 32)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7)


def parse(*flags: str) -> WorkerSettings:
    return parse_settings(WorkerSettings, flags, prog="test")


def copy_of(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def test_a_draft_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other = copy_of(PICO_DRAFT, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    with pytest.raises(ConfigError, match=r"draft_model other has another tokenizer\.json than pico"):
        plan_draft_model(parse(f"--draft-model={other}"), ModelDir(PICO), "fp32", LAYOUT, 100, 2048)


def test_a_draft_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = copy_of(PICO_DRAFT, tmp_path / "other")
    edit_config(other, vocab_size=5000)
    with pytest.raises(ConfigError, match="vocab_size 5000, pico has 4096"):
        plan_draft_model(parse(f"--draft-model={other}"), ModelDir(PICO), "fp32", LAYOUT, 100, 2048)


def test_a_chat_template_is_no_other_tokenizer(tmp_path: Path) -> None:
    other = copy_of(PICO_DRAFT, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert plan_draft_model(parse(f"--draft-model={other}"), ModelDir(PICO), "fp32", LAYOUT, 100, 2048) is not None


def test_the_draft_pool_holds_as_much_in_a_quarter_of_the_bytes() -> None:
    settings = parse("--draft-model=pico-draft")
    plan = plan_draft_model(settings, ModelDir(PICO), "fp32", replace(LAYOUT, dtype="fp32"), 1000, 2048)
    assert plan is not None
    assert (plan.num_blocks, plan.max_context, plan.layout.dtype) == (1000, 2048, "fp32"), "a sixth of the target's bytes a token"
    plan = plan_draft_model(settings, ModelDir(PICO), "fp32", LAYOUT, 1000, 2048)
    assert plan is not None
    assert plan.pool_bytes <= 1000 * LAYOUT.block_bytes / 4 < plan.pool_bytes + plan.layout.block_bytes
    plan = plan_draft_model(settings, ModelDir(PICO), "fp32", LAYOUT, 10, 2048)
    assert plan is not None
    assert plan.num_blocks == 64, "one sequence always fits"
    assert plan_draft_model(parse(), ModelDir(PICO), "fp32", LAYOUT, 10, 2048) is None
    assert plan_draft_model(parse("--role=prefill", "--draft-model=pico-draft"), ModelDir(PICO), "fp32", LAYOUT, 10, 2048) is None


@pytest.mark.parametrize("flags", [["--speculate=off"], ["--role=prefill"], []], ids=["off", "prefill", "auto"])
def test_only_who_generates_speculates(flags: list[str], tmp_path: Path) -> None:
    save_checkpoint(family_configs()["llama"], tmp_path)
    loaded = load_worker(parse(f"--model={tmp_path}", "--dtype=fp32", "--threads=1", *flags))
    spec = make_spec([1, 2, 3, 4, 5] * 6, 60)
    loaded.engine.add(spec)
    updates = drain(loaded.engine)
    assert len(tokens_of(updates, spec)) == 60
    assert loaded.engine._proposals.is_on != bool(flags)


def test_the_cost_table_is_measured_within_its_time() -> None:
    """On a pool so small that wide steps do not fit, for a worker of few sequences, and with no time at all."""
    runner = make_engine(load_model(PICO), num_blocks=3).runner
    began = time.perf_counter()
    points = {(p.num_sequences, p.num_rows): p.seconds for p in measure_steps(runner, SHAPES, 0.3, 4, time.perf_counter)}
    assert time.perf_counter() - began < 5.0
    assert {1, 4} >= {n for n, _ in points} >= {1}
    assert max(rows // n for n, rows in points) <= 33
    assert all(seconds > 0 for seconds in points.values())
    assert len(measure_steps(runner, SHAPES, 0.0, 4, time.perf_counter)) == 2
    assert len(measure_steps(runner, DRAFT_SHAPES, 9.0, 64, time.perf_counter)) == 4


def limits() -> JobLimits:
    return JobLimits(4096, 2048, 1000, LAYOUT, Fingerprint(b"", b"", b"", b"", "plain", 32))


@pytest.mark.parametrize(
    ("ids", "says"),
    [([4096], r"predicted_token_ids\[0\]: is 4096"), ([1] * 2049, "2049 of them, accepted: at most 2048")],
)
def test_predicted_ids_are_checked_again_at_the_worker(ids: list[int], says: str) -> None:
    submit = fleet_pb2.Submit(
        attempt=1, part=fleet_pb2.PART_WHOLE, prompt_token_ids=[1], sampling=sampling_to_wire(GREEDY),
        stopping=stopping_to_wire(StopParams(5)), predicted_token_ids=ids,
    )  # fmt: skip

    class Nobody:
        pass

    with pytest.raises(InvalidInput, match=says):
        make_job(submit, Nobody(), limits(), 0.0)  # type: ignore[arg-type]
    submit.predicted_token_ids[:] = [4095] * 2048
    assert make_job(submit, Nobody(), limits(), 0.0).spec.predicted == (4095,) * 2048  # type: ignore[arg-type]


def test_split_whole_and_resumed_give_the_same_tokens_whoever_drafts() -> None:
    """P11 through the services: hand-off into a batch that speculates, and resume with output, half of it predicted."""
    model, draft = load_model(PICO), load_model(PICO_DRAFT)
    draw = random.Random(5)
    prompts = [[draw.randrange(VOCAB) for _ in range(length)] for length in (40, 97)]

    async def scene() -> None:
        speculator = make_speculator(Always(), draft_model=make_draft_model(draft))
        rig = Rig(make_engine(model, chunk_tokens=64), make_engine(model, num_blocks=128, speculator=speculator))
        for prompt in prompts:
            spec = make_spec(prompt, 24, sampling=SAMPLED)
            plain = make_engine(model)
            plain.add(spec)
            expected = tokens_of(drain(plain), spec)
            predicted = [*expected[:9], 3, *expected[10:]]

            def ask(predicted: list[int] = predicted, prompt: list[int] = prompt, **how: object) -> Answer:
                return rig.ask(prompt, 24, sampling=SAMPLED, predicted=predicted, **how)  # type: ignore[arg-type]

            split, whole, resumed = ask(), ask(part=fleet_pb2.PART_WHOLE), ask(output=expected[:7])
            await until(lambda: all(a.end is not None for a in (split, whole, resumed)))  # noqa: B023
            assert split.ids() == whole.ids() == expected
            assert resumed.ids() == expected[7:]
        await rig.settle()
        counts = rig.decode.engine.draft_counts()
        assert counts["predicted"].num_accepted > 0 and counts["model"].num_drafted > 0
        assert speculator.num_followed == 0
        rig.close()

    play(scene())
