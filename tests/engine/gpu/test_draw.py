"""The draw without a sort against ../sample.py's, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitfire.core.sampling import SamplingParams
from splitfire.engine.kernels.gpu import sample as gpu
from splitfire.engine.kernels.gpu.sample import DrawRows, draw
from splitfire.engine.kernels.sample import SampleRow, noise_key, sample

PROGRAMS = 12


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """So that a small vocabulary has several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "PIECE", 128)
    yield
    patch.undo()


def rows_of(rows: list[SampleRow], mask_rows: list[int], adjusted_rows: list[int]) -> DrawRows:
    params = [row.sampling for row in rows]
    keys = [noise_key(row.sampling.seed, row.choice, row.position) for row in rows]
    return DrawRows(
        torch.tensor([0.0 if p.is_greedy else p.temperature for p in params]), torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params]), torch.tensor([math.log(p.min_p) if p.min_p else -math.inf for p in params]),
        torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys]), torch.tensor(mask_rows, dtype=torch.int32),
        torch.tensor(adjusted_rows, dtype=torch.int32),
    )  # fmt: skip


def row(seed: int, params: Mapping[str, float], mask: Tensor | None = None) -> SampleRow:
    return SampleRow(SamplingParams(seed=seed, logprobs=0, **params), 0, 5 + seed, (), (), frozenset(), mask)  # type: ignore[arg-type]


FILTERS: list[dict[str, float]] = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 3.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 2.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.3}, {"temperature": 1.5, "top_p": 0.95}, {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8}, {"temperature": 4.0, "top_k": 60, "top_p": 0.5, "min_p": 0.01},
]  # fmt: skip


def check(logits: Tensor, rows: list[SampleRow]) -> None:
    masks = [r.mask for r in rows if r.mask is not None]
    numbers = iter(range(len(masks)))
    given_rows = rows_of(rows, [-1 if r.mask is None else next(numbers) for r in rows], [-1] * len(rows))
    drawn = draw(logits, given_rows, torch.stack(masks) if masks else None, None, PROGRAMS)
    want = sample(logits, rows)
    assert drawn.tokens.tolist() == [w.token_id for w in want]
    torch.testing.assert_close(drawn.logprobs, torch.tensor([w.logprob for w in want]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [1, 31, 128, 129, 400])
def test_it_is_the_token_of_the_reference(vocab: int) -> None:
    torch.manual_seed(vocab)
    rows = [row(seed, params) for seed in range(3) for params in FILTERS if params.get("top_k", 0) <= vocab]
    check(torch.randn(len(rows), vocab) * 3, rows)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 200), st.sampled_from([0.1, 1.0, 30.0]))
def test_it_is_so_for_any_seed_and_spread(seed: int, vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [row(seed + i, params) for i, params in enumerate(FILTERS) if params.get("top_k", 0) <= vocab]
    check(torch.randn(len(rows), vocab, generator=generator) * spread, rows)


def test_equal_scores_rank_by_their_ids() -> None:
    """Where a filter ends among them, the lower ids survive, as in a stable sort."""
    logits = torch.zeros(40, 200)
    logits[:, 100:] = -20.0
    check(logits, [row(seed, {"temperature": 1.0, "top_p": 0.305}) for seed in range(40)])


def test_what_a_grammar_forbids_is_never_drawn() -> None:
    torch.manual_seed(0)
    vocab = 300
    mask = torch.randint(-(1 << 31), 1 << 31, (10,), dtype=torch.int64).to(torch.int32)
    rows = [row(seed, params, mask if seed % 3 else None) for seed, params in enumerate(FILTERS)]
    check(torch.randn(len(rows), vocab) * 2, rows)


def test_rows_that_are_not_finite_say_so_and_others_do_not_care() -> None:
    torch.manual_seed(0)
    rows = [row(seed, {"temperature": 1.0, "top_p": 0.9}) for seed in range(4)]
    logits = torch.randn(4, 300)
    want = [w.token_id for w in sample(logits, rows)]
    logits[1, 200], logits[2, 7] = torch.nan, torch.inf
    drawn = draw(logits, rows_of(rows, [-1] * 4, [-1] * 4), None, None, PROGRAMS)
    assert drawn.tokens.tolist() == [want[0], -1, -1, want[3]]


def test_adjusted_logits_decide_and_the_models_own_are_told() -> None:
    torch.manual_seed(0)
    rows, logits = [row(seed, {"temperature": 1.0}) for seed in range(3)], torch.randn(3, 300)
    adjusted = torch.full((1, 300), -50.0)
    adjusted[0, 123] = 50.0
    drawn = draw(logits, rows_of(rows, [-1] * 3, [-1, 0, -1]), None, adjusted, PROGRAMS)
    assert drawn.tokens[1] == 123
    torch.testing.assert_close(drawn.logprobs[1], logits[1].log_softmax(-1)[123])
