"""An engine whose steps run as on a GPU, against one that runs the torch model: the same tokens, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import pytest
import torch
from transformers import Qwen3Config

from splitfire.core.layout import KvLayout
from splitfire.core.sampling import SamplingParams, StopParams, TokenBias
from splitfire.engine.blocks import BlockPool
from splitfire.engine.device import graphs
from splitfire.engine.device import runner as device_runner
from splitfire.engine.device.runner import DeviceRunner
from splitfire.engine.drafting import Draft, Verified
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.gpu import sample as gpu_sample
from splitfire.engine.kernels.gpu import shared_prefixes
from splitfire.engine.kernels.gpu.prepare import FEW_ROWS
from splitfire.engine.models.gpu import GpuTransformer
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.pool import KvPool
from splitfire.engine.scheduler import Budget
from splitfire.engine.sequence import SeqId, Sequence, SequenceSpec
from tests.checkpoints import family_configs, save_checkpoint
from tests.engine.device.graphs import Replayer
from tests.engines import GREEDY, answers_of, assert_no_leaks, drain, load_model, make_engine, make_spec, sampled_of, tokens_of
from tests.grammars import REGEX, compiled

T = TypeVar("T")
LANES, CONTEXT, BLOCKS, SIZE = 4, 160, 40, 16
# Numpy's, who computes for the interpreter: rows of a recorded shape that nobody has hold anything.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path: Path = tmp_path_factory.mktemp("tiny")
    values = family_configs()["qwen3"].to_dict()
    save_checkpoint(Qwen3Config(**{**values, "num_hidden_layers": 1, "layer_types": values["layer_types"][:1]}), path)
    return load_model(path)


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu_sample, "PIECE", 4096)
    patch.setattr(graphs, "ROWS", (4,))
    patch.setattr(device_runner, "ROWS", (4,))
    yield
    patch.undo()


class Scripted:
    """Drafts what it is told: tokens of the right answer, then a wrong one."""

    def __init__(self, answers: Mapping[SeqId, Seq[int]], widths: Mapping[SeqId, int]) -> None:
        self.answers = answers
        self.widths = widths

    def can_skip(self, num_decoding: int) -> bool:
        return False

    def skip(self, num_decoding: int) -> None: ...

    def propose(self, decoding: Seq[Sequence], room: int) -> Mapping[SeqId, Draft]:
        drafts = {}
        for s in decoding:
            right = self.answers[s.spec.seq_id][s.num_output :][: self.widths.get(s.spec.seq_id, 0)]
            if right:
                drafts[s.spec.seq_id] = Draft((*right, (right[-1] + 1) % 4096), "script")
        return drafts

    def verified(self, results: Seq[Verified], num_rows: int, duration_s: float) -> None: ...

    def forget(self, seq_id: SeqId) -> None: ...


def device_engine(model: Transformer, recorder: Replayer | None, speculator: Scripted | None = None) -> Engine:
    config = model.config
    pool = KvPool(KvLayout("fp32", config.num_layers, config.num_kv_heads, config.head_dim, SIZE), BLOCKS, torch.device("cpu"))
    pool.raw.fill_(0xFF)
    body = GpuTransformer(config, model.weights, model.rope, num_multiprocessors=3)
    runner = DeviceRunner(body, pool, LANES, CONTEXT)
    runner.state.newest.fill_(1 << 40)
    runner.state.tables.fill_(BLOCKS - 1)
    if recorder is not None:
        runner.record(recorder, lambda done, count: None)
    return Engine(runner, BlockPool(BLOCKS), Budget(32, LANES), lambda: 0.0, speculator)


def specs_of(*samplings: SamplingParams, max_tokens: int = 5) -> list[SequenceSpec]:
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 4096, (5 + 8 * i,), generator=draw).tolist() for i in range(len(samplings))]
    return [
        make_spec(p, max_tokens + i, sampling=s, block_size=SIZE) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))
    ]


def counted(engine: Engine) -> list[int]:
    """Steps launched while another was in flight, as they come."""
    scheduler, found = engine._scheduler, []
    launched = scheduler.launched

    def noted(step: object) -> None:
        found.append(int(scheduler.lanes.num_in_flight.max()))
        launched(step)  # type: ignore[arg-type]

    scheduler.launched = noted  # type: ignore[method-assign]
    return found


MIX = (
    GREEDY,
    SamplingParams(temperature=1.3, top_k=40, top_p=0.9, seed=3),
    SamplingParams(temperature=0.8, min_p=0.02, seed=2**63 + 1),
    SamplingParams(temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.6, seed=9, logit_bias=(TokenBias(5, 3.0),)),
)


def torch_engine(model: Transformer) -> Engine:
    return make_engine(model, block_size=SIZE, num_blocks=BLOCKS, chunk_tokens=32, max_running=LANES)


def test_tokens_are_those_of_the_torch_engine_and_steps_overlap(model: Transformer) -> None:
    specs = specs_of(*MIX)
    want = answers_of(torch_engine(model), specs)
    recorder = Replayer()
    engine = device_engine(model, recorder)
    flights = counted(engine)
    assert answers_of(engine, specs) == want
    assert flights.count(1) >= 4, "decode steps were launched behind one another"
    assert recorder.num_replays >= 5


def test_drafts_change_how_many_steps_it_takes_and_nothing_else(model: Transformer) -> None:
    specs = specs_of(MIX[3], MIX[1], max_tokens=6)
    want = answers_of(torch_engine(model), specs)
    engine = device_engine(model, None, Scripted(want, {specs[0].seq_id: 3, specs[1].seq_id: 1}))
    assert answers_of(engine, specs) == want
    counts = engine.draft_counts()["script"]
    assert 0 < counts.num_accepted < counts.num_drafted


def test_who_stops_behind_everybodys_back_is_told_nothing_more(model: Transformer) -> None:
    """A stop token is seen when the next step is in flight already."""
    [spec] = specs_of(GREEDY)
    free = answers_of(torch_engine(model), [spec])[spec.seq_id]
    stopping = replace(spec, seq_id=SeqId(10**6), stopping=StopParams(30, 0, frozenset({free[3]})))
    engine = device_engine(model, None)
    flights = counted(engine)
    assert answers_of(engine, [stopping])[stopping.seq_id] == free[: free.index(free[3]) + 1]
    assert 1 in flights


def test_what_the_host_has_a_part_in(model: Transformer) -> None:
    """Stop tokens that may not come yet, log-probabilities, a grammar: without drafts, and the grammar with them."""
    [plain] = specs_of(GREEDY)
    first = answers_of(torch_engine(model), [plain])[plain.seq_id][0]
    sampled = SamplingParams(temperature=1.0, seed=4)
    held, scored, shaped = specs_of(GREEDY, replace(sampled, logprobs=2), sampled, max_tokens=4)
    held = replace(held, stopping=StopParams(4, 3, frozenset({first})))
    shaped = replace(shaped, grammar=compiled(REGEX, "[a-z]{5}[0-9]{4}"))
    told = []
    for engine in (torch_engine(model), device_engine(model, None)):
        for spec in (held, scored, shaped):
            engine.add(spec)
        told.append(drain(engine))
    for spec in (held, scored, shaped):
        assert tokens_of(told[0], spec) == tokens_of(told[1], spec) != []
    for want, got in zip(sampled_of(told[0], scored), sampled_of(told[1], scored), strict=True):
        assert [t.token_id for t in want.top] == [t.token_id for t in got.top]
        assert want.logprob == pytest.approx(got.logprob, abs=1e-4)
    answers = {shaped.seq_id: tokens_of(told[0], shaped)}
    assert answers_of(device_engine(model, None, Scripted(answers, {shaped.seq_id: 2})), [shaped]) == answers


def test_logits_that_are_no_numbers_end_their_sequence_alone(model: Transformer) -> None:
    bad, good = specs_of(GREEDY, GREEDY, max_tokens=6)
    want = answers_of(torch_engine(model), [good])[good.seq_id]
    engine = device_engine(model, None)
    engine.add(bad)
    engine.add(good)
    updates = list(engine.step().updates)
    [sequence] = [s for s in engine._scheduler.running if s.spec is bad]
    engine.runner.pool.elements[sequence.block_ids[0], :, 1] = torch.nan
    updates += drain(engine)
    assert [u.error for u in updates if u.seq_id == bad.seq_id and u.is_finished] == ["nonfinite_logits"]
    assert tokens_of(updates, good) == want
    assert_no_leaks(engine)


def test_a_prefix_that_sequences_share_is_attended_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "LEAST_SAVED", 64)
    monkeypatch.setattr(shared_prefixes, "SHORTEST", 64)
    stem = torch.randint(0, 4096, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    specs = [make_spec([*stem, *range(i, 5)], 6 + i, sampling=s, block_size=SIZE) for i, s in enumerate(MIX[:2])]
    want = answers_of(torch_engine(model), specs)
    recorder = Replayer()
    engine = device_engine(model, recorder)
    engine.add(specs[0])
    updates = [*engine.step().updates, *engine.step().updates, *engine.step().updates]
    engine.add(specs[1])
    updates += drain(engine)
    assert {spec.seq_id: tokens_of(updates, spec) for spec in specs} == want
    assert any("_cut" in names and names.count("_attend") == 2 for names in recorder.replayed), "nobody shared anything"
    made = cast(DeviceRunner, engine.runner)
    assert len(made._prefix_lanes)
    engine.add(replace(specs[0], seq_id=SeqId(10**7)))  # whose chunk is no replay: what was shared in its lane is not
    engine.step()
    assert not len(made._prefix_lanes)


def test_what_is_compiled_beforehand_writes_nothing(model: Transformer) -> None:
    engine = device_engine(model, None)
    made = cast(DeviceRunner, engine.runner)
    before = (made.pool.raw.clone(), made.state.newest.clone(), made.state.tokens.clone())
    made.state.tables.fill_(0)
    made.compile_others()
    assert all(torch.equal(a, b) for a, b in zip(before, (made.pool.raw, made.state.newest, made.state.tokens), strict=True))


def test_a_sequence_with_more_rows_than_attention_of_few_takes_is_not_replayed() -> None:
    ladder: graphs.Ladder[None] = graphs.Ladder(2, shares=False)
    ladder.record(Nothing(), lambda shape: None, lambda done, count: None)
    assert ladder.fit(4, 4, shares=False) is not None
    assert ladder.fit(4, FEW_ROWS, shares=False) is not None and ladder.fit(4, FEW_ROWS + 1, shares=False) is None
    assert ladder.fit(5, 1, shares=False) is None


class Nothing:
    """Records nothing."""

    def record(self, run: Callable[[], T]) -> graphs.Recorded[T]:
        return graphs.Recorded(run(), lambda: None)
