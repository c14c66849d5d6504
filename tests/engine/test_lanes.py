"""The running batch as columns says what its sequences say, one by one."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfire.core.sampling import SamplingParams
from splitfire.engine.batch import batch_of
from splitfire.engine.drafting import Draft
from splitfire.engine.kernels.attention import QuerySpan, plan_attention, plan_batch
from splitfire.engine.lanes import NEVER, Lanes
from splitfire.engine.sequence import Sequence
from tests.engine.test_scheduler import BLOCK, Bench
from tests.engines import make_spec


def sequence(length: int = 5, max_tokens: int = 10, **more: object) -> Sequence:
    made = Sequence(make_spec(list(range(length)), max_tokens, block_size=BLOCK, **more), 0, BLOCK)  # type: ignore[arg-type]
    made.block_ids = list(range(-(-length // BLOCK)))  # type: ignore[arg-type]
    return made


def test_tokens_are_taken_in_as_one_by_one() -> None:
    lanes = Lanes(8, BLOCK)
    stops = [frozenset({3}), frozenset(), frozenset({1, 2, 3, 4, 5}), frozenset({9})]
    mates = [sequence(5 + i, 4, stop=stop) for i, stop in enumerate(stops)]
    for mate in mates:
        lanes.take(mate)
        lanes.decode(mate)
    draw = random.Random(1)
    for _ in range(3):
        expected = [draw.randrange(6) for _ in mates]
        offsets = [m.num_output for m in mates]
        appended = lanes.append(lanes.decoding, np.array(expected))
        assert [m.tokens[-1] for m in mates] == expected
        assert appended.offsets.tolist() == offsets
        assert appended.has_stopped.tolist() == [t in s for t, s in zip(expected, stops, strict=True)]
        assert appended.has_ended.tolist() == [t in s or m.num_left <= 0 for t, s, m in zip(expected, stops, mates, strict=True)]
        assert appended.has_filled.tolist() == [m.num_computed // BLOCK > m.num_committed_blocks for m in mates]
    assert appended.has_filled.any() and not appended.has_filled.all()
    appended = lanes.append(lanes.decoding, np.zeros(4, np.int64))
    assert appended.has_ended.all() and not appended.has_stopped.any()


def test_a_lane_is_used_again_and_remembers_nothing() -> None:
    lanes = Lanes(1, BLOCK)
    first = sequence(40, 10, stop=frozenset(range(60)))
    lanes.take(first)
    lanes.decode(first)
    lanes.leave(first)
    assert not len(lanes.decoding) and first.lane == -1
    second = sequence(3, 10)
    lanes.take(second)
    assert not len(lanes.decoding)
    lanes.decode(second)
    lanes.check()
    appended = lanes.append(lanes.decoding, np.array([7]))
    assert not (appended.has_ended | appended.has_stopped | appended.has_filled).any()


def test_only_plain_greedy_sequences_take_the_most_likely_token() -> None:
    cases = {
        None: [
            SamplingParams(temperature=0.7), SamplingParams(temperature=0.0, repetition_penalty=1.1),
            SamplingParams(temperature=0.0, logprobs=0), SamplingParams(temperature=0.0, frequency_penalty=0.1),
        ],
        5: [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, seed=4, top_p=0.3)],
    }  # fmt: skip
    for expected, samplings in cases.items():
        for sampling in samplings:
            assert sequence(5, sampling=sampling).greedy_from == expected
    assert sequence(5, stop=frozenset({1}), min_tokens=3).greedy_from == 8
    lanes = Lanes(2, BLOCK)
    lanes.take(sequence(5, sampling=SamplingParams()))
    lanes.take(sequence(5))
    assert lanes.greedy_from.tolist() == [NEVER, 5]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(1, 40), st.integers(2, 30)), min_size=1, max_size=8),
    chunk=st.integers(8, 40),
    seed=st.integers(0, 1000),
)
def test_the_arrays_of_a_step_are_those_of_its_pieces(shape: list[tuple[int, int]], chunk: int, seed: int) -> None:
    bench, draw = Bench(60, chunk_tokens=chunk), random.Random(seed)
    for i, (length, count) in enumerate(shape):
        bench.add(length, count, token=i * 1000)
    while bench.scheduler.running or bench.scheduler.waiting:
        ids = [s.spec.seq_id for s in bench.scheduler.running if s.is_decoding and draw.random() < 0.5]
        drafts = {seq_id: Draft(tuple(draw.choices((1, 2), (8, 1), k=draw.randrange(9))), "x") for seq_id in ids}
        step = bench.scheduler.schedule(drafts=drafts)
        pieces, batch = step.pieces(), batch_of(step)
        rows, logit_rows = 0, []
        for i, piece in enumerate(pieces):
            begin, end = batch.query_begins[i : i + 2].tolist()
            known = [*piece.sequence.tokens[: piece.end], *piece.drafts]
            assert begin == rows and end - begin == piece.num_rows
            assert batch.token_ids[begin:end].tolist() == known[piece.begin :]
            assert batch.positions[begin:end].tolist() == list(range(piece.begin, len(known)))
            assert batch.context_lens[i] == len(known)
            num_blocks = -(-len(known) // BLOCK)
            assert batch.block_tables[batch.lanes[i], :num_blocks].tolist() == piece.sequence.block_ids[:num_blocks]
            rows = end
            if piece.samples:
                logit_rows += list(range(end - 1 - len(piece.drafts), end))
        assert batch.logit_rows.tolist() == logit_rows
        assert len(batch.token_ids) == len(batch.positions) == rows == step.num_rows <= chunk + 8
        for array in (batch.token_ids, batch.positions, batch.query_begins, batch.context_lens, batch.lanes, batch.logit_rows):
            assert array.dtype == np.int64 and array.flags.c_contiguous
        assert batch.block_tables.dtype == np.int32 and batch.block_tables.flags.c_contiguous
        bench.update(pieces)


def test_attention_is_planned_from_arrays_as_from_spans() -> None:
    """Garbage past a sequence's blocks is never read."""
    lens = [(1, 70), (1, 3), (5, 20), (1, 1), (1, 900), (2, 2), *[(1, 20 + i) for i in range(9)]]
    spans, begin, tables = [], 0, np.full((len(lens), 200), -9, np.int32)
    for i, (new, context) in enumerate(lens):
        ids = tuple(range(i * 100, i * 100 + -(-context // BLOCK)))
        spans.append(QuerySpan(begin, begin + new, context, ids))
        tables[i, : len(ids)] = ids
        begin += new
    cpu = torch.device("cpu")
    begins = np.array([s.begin for s in spans] + [begin])
    contexts = np.array([s.context_len for s in spans])
    plan, other = plan_attention(spans, cpu), plan_batch(begins, contexts, tables, -(-contexts // BLOCK), cpu)
    assert len(plan.decodes) == len(other.decodes) > 1
    ours: list[Any] = [*other.decodes, *other.chunks]
    for a, b in zip([*plan.decodes, *plan.chunks], ours, strict=True):
        for field in fields(b):
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    assert all((d.block_tables >= 0).all() for d in other.decodes)
