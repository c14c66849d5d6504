"""What the device makes of a step's words, against the batch that they were made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitfire.core.sampling import SamplingParams, TokenBias
from splitfire.engine.batch import StepBatch
from splitfire.engine.kernels.gpu.adjust import Adjustments, adjust
from splitfire.engine.kernels.gpu.draw_rows import LaneParameters, draw_rows
from splitfire.engine.kernels.gpu.prepare import FEW_ROWS, PIECE, prepare, settle, words_of
from splitfire.engine.kernels.sample import SampleRow, _adjust, lane_key, noise_key

LANES, BLOCKS, SIZE = 150, 400, 16
CPU = torch.device("cpu")


def batch_of(shapes: list[tuple[int, int]], seed: int = 0) -> StepBatch:
    """(new tokens, context) of each sequence, its lane and blocks anywhere."""
    draw = np.random.default_rng(seed)
    tables = draw.permutation(BLOCKS * 60)[: LANES * 20].reshape(LANES, 20).astype(np.int32) % BLOCKS
    begins = np.cumsum([0, *(rows for rows, _ in shapes)])
    positions = np.concatenate([np.arange(context - rows, context) for rows, context in shapes] or [np.zeros(0, np.int64)])
    lanes = draw.permutation(LANES)[: len(shapes)]
    contexts = np.array([context for _, context in shapes], np.int64)
    return StepBatch(draw.integers(0, 1000, len(positions)), positions, begins, contexts, lanes, tables, begins[:0], 0)


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(1, 300), (5, 5), (1, 17)], [(FEW_ROWS + 1, 200), (1, 1), (FEW_ROWS, 300)], [(1, 1 + i) for i in range(PIECE + 1)]],
    ids=lambda shapes: str(len(shapes)),
)
@pytest.mark.parametrize("spare", [0, 3])
def test_a_step_is_made_as_the_host_would(shapes: list[tuple[int, int]], spare: int) -> None:
    batch = batch_of(shapes)
    count, rows = len(batch.lanes), len(batch.token_ids)
    capacity, num_rows = count + spare, rows + 2 * spare
    newest, tokens = torch.arange(LANES) + 5000, torch.full((BLOCKS, SIZE), -7, dtype=torch.int32)
    batch.token_ids[::2] = -1
    words = torch.from_numpy(words_of(batch, capacity, num_rows))
    made = prepare(words, newest, torch.from_numpy(batch.block_tables), tokens, capacity, num_rows, SIZE)
    row_lanes = np.repeat(batch.lanes, np.diff(batch.query_begins))
    want = np.where(batch.token_ids < 0, row_lanes + 5000, batch.token_ids)
    assert made.token_ids[:rows].tolist() == want.tolist()
    assert made.positions[:rows].tolist() == batch.positions.tolist()
    assert made.row_lanes.tolist() == [*row_lanes, *[-1] * (num_rows - rows)]
    blocks = batch.block_tables[row_lanes, batch.positions // SIZE]
    assert made.targets.blocks.tolist() == [*blocks, *[-1] * (num_rows - rows)]
    assert made.targets.offsets[:rows].tolist() == (batch.positions % SIZE).tolist()
    is_few = np.diff(batch.query_begins) <= FEW_ROWS
    for spans, mine in ((made.few, is_few), (made.many, ~is_few)):
        lens = (spans.ends - spans.begins).numpy()
        assert lens[:count].tolist() == np.where(mine, np.diff(batch.query_begins), 0).tolist()
        assert not lens[count:].any()
        assert spans.begins[:count][mine].tolist() == batch.query_begins[:-1][mine].tolist()
        assert spans.contexts[:count].tolist() == batch.context_lens.tolist()
        assert spans.lanes[:count].tolist() == batch.lanes.tolist()
    if len(set(zip(blocks.tolist(), (batch.positions % SIZE).tolist(), strict=True))) == rows:
        assert tokens[blocks, batch.positions % SIZE].tolist() == want.tolist()
    assert (tokens == -7).sum() >= tokens.numel() - rows


def test_a_newest_token_that_is_none_reads_nothing_out_of_place() -> None:
    batch = batch_of([(1, 4)])
    batch.token_ids[0] = -1
    newest = torch.full((LANES,), -1)
    words = torch.from_numpy(words_of(batch, 1, 1))
    tokens = torch.zeros(BLOCKS, SIZE, dtype=torch.int32)
    assert prepare(words, newest, torch.from_numpy(batch.block_tables), tokens, 1, 1, SIZE).token_ids.tolist() == [0]


@pytest.mark.parametrize(
    ("drafts", "drawn", "newest"),
    [
        ([], [8], 8),
        ([8, 9], [8, 9, 4], 4),
        ([8, 9], [8, 3, 4], 3),
        ([8, 9], [7, 9, 4], 7),
        ([8, 9], [8, -1, 4], -1),
        ([8, 9], [-1, 9, 4], -1),
    ],
)
def test_drafts_are_right_as_far_as_they_are_what_was_drawn(drafts: list[int], drawn: list[int], newest: int) -> None:
    """Beside a sequence without drafts, and one whose are all right."""
    batch = batch_of([(1, 5), (1 + len(drafts), 40), (3, 9)])
    ids = [1, 2, *drafts, 3, 20, 21]
    words = torch.from_numpy(words_of(replace(batch, token_ids=np.array(ids)), 5, len(ids) + 2))
    known = torch.full((LANES,), -5)
    settle(words, torch.tensor([*ids, 0, 0]), torch.tensor([10, *drawn, 20, 21, 22, 0, 0]), known, 5)
    assert known[batch.lanes].tolist() == [10, newest, 22]
    assert (known == -5).sum() == LANES - 3


def test_rows_get_their_lanes_parameters_and_keys() -> None:
    lanes = LaneParameters.of(4, CPU)
    lanes.temperatures.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    lanes.top_k.copy_(torch.tensor([0, 5, 6, 7]))
    key = lane_key(2**63 + 11, 3)
    lanes.keys[2] = key - (1 << 64) if key >> 63 else key
    rows = draw_rows(lanes, torch.tensor([2, -1, 1], dtype=torch.int32), torch.tensor([70, 0, 3]))
    assert rows.temperatures.tolist() == [2.0, 0.0, 1.0] and rows.top_k.tolist() == [6, 0, 5]
    assert rows.keys[0].item() % (1 << 64) == noise_key(2**63 + 11, 3, 71)


VOCAB = 3000
CASES = [
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(presence_penalty=0.5, frequency_penalty=-1.25),
    SamplingParams(repetition_penalty=0.5, frequency_penalty=2.0, logit_bias=(TokenBias(3, 5.0), TokenBias(2999, -100.0))),
    SamplingParams(),
]


def test_penalties_and_biases_are_those_of_torch() -> None:
    """On tokens that stand in blocks in any order, with duplicates in prompt and output."""
    draw = np.random.default_rng(3)
    torch.manual_seed(0)
    logits = torch.randn(6, VOCAB)
    lens, prompts = [90, 40, 1, 33], [30, 40, 1, 16]
    tokens = torch.full((BLOCKS, SIZE), 2**31 - 1, dtype=torch.int32)
    tables = torch.from_numpy(draw.permutation(BLOCKS)[: 6 * 20].reshape(6, 20).astype(np.int32))
    lanes, rows = [5, 0, 3, 2], [1, 4, 0, 5]
    histories, want, edits = [], [], []
    for i, params in enumerate(CASES):
        history = draw.integers(0, 25, lens[i])
        histories.append(history)
        at = np.arange(lens[i])
        tokens[tables[lanes[i]].numpy()[at // SIZE], at % SIZE] = torch.from_numpy(history.astype(np.int32))
        blocked = frozenset({7, 8}) if i == 3 else frozenset[int]()
        row = SampleRow(params, 0, 0, history[: prompts[i]].tolist(), history[prompts[i] :].tolist(), blocked)
        want.append(_adjust(logits[rows[i]], row))
        edits.append([(b.token_id, b.bias) for b in params.logit_bias] + [(t, -np.inf) for t in blocked])
    positions = torch.full((6,), -1)
    positions[rows] = torch.tensor(lens) - 1
    asked = Adjustments(
        torch.tensor(rows), torch.tensor(lanes, dtype=torch.int32), torch.tensor(prompts, dtype=torch.int32),
        torch.tensor([p.repetition_penalty for p in CASES]), torch.tensor([p.presence_penalty for p in CASES]),
        torch.tensor([p.frequency_penalty for p in CASES]),
        torch.tensor(np.cumsum([0, *(len(e) for e in edits)]), dtype=torch.int32),
        torch.tensor([t for e in edits for t, _ in e], dtype=torch.int32), torch.tensor([v for e in edits for _, v in e]).float(),
    )  # fmt: skip
    got = adjust(logits, positions, asked, tables, tokens)
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-6)
