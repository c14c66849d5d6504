"""The compiled draw against the torch one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitfire.core.sampling import SamplingParams
from splitfire.engine.kernels.native import step as native
from splitfire.engine.kernels.sample import draw_row, noise_key
from tests.engines import needs_compiled

pytestmark = needs_compiled

FILTERS = (
    SamplingParams(), SamplingParams(temperature=3.0), SamplingParams(temperature=0.2), SamplingParams(top_k=1),
    SamplingParams(temperature=2.0, top_k=7), SamplingParams(top_p=0.3), SamplingParams(temperature=1.5, top_p=0.95),
    SamplingParams(min_p=0.1), SamplingParams(temperature=2.0, top_k=20, top_p=0.8),
    SamplingParams(temperature=4.0, top_k=60, top_p=0.5, min_p=0.01),
)  # fmt: skip


def check(logits: Tensor, params: SamplingParams, seed: int) -> None:
    key = noise_key(seed, 0, 7)
    assert native.draw(logits, params, key) == draw_row(logits, params, key), (params, seed)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 4096, 49152])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_it_draws_the_token_of_the_reference(vocab: int, spread: float) -> None:
    torch.manual_seed(vocab)
    for seed in range(3):
        logits = torch.randn(vocab) * spread
        for params in FILTERS:
            check(logits, params, seed)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, (1 << 63) - 1), vocab=st.integers(1, 300), temperature=st.floats(0.05, 8.0), top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0), min_p=st.floats(0.0, 0.5),
)  # fmt: skip
def test_it_does_so_for_any_parameters(seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 4
    check(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), seed)


def test_the_whole_distribution_is_drawn() -> None:
    """Shares of 20 000 draws from five tokens, one of them forbidden, within four standard deviations."""
    logits = torch.tensor([1.0, 0.0, -1.0, -torch.inf, 2.0])
    drawn = [native.draw(logits, SamplingParams(), noise_key(seed, 0, 0)) for seed in range(20_000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    want = logits.softmax(-1)
    assert ((shares - want).abs() <= 4 * (want * (1 - want) / len(drawn)).sqrt()).all()
    assert shares[3] == 0


def test_equal_scores_rank_by_their_ids() -> None:
    logits = torch.zeros(200)
    logits[100:] = -20.0
    for seed in range(200):
        check(logits, SamplingParams(top_p=0.305), seed)


@pytest.mark.parametrize(
    "params", [SamplingParams(top_p=5e-324), SamplingParams(temperature=100.0, top_p=5e-324, top_k=3, min_p=1.0)]
)
def test_the_most_likely_token_survives_any_filter(params: SamplingParams) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    assert native.draw(logits, params, 1) == int(logits.argmax())


@pytest.mark.parametrize("params", FILTERS)
def test_logits_that_a_penalty_made_infinite_are_drawn_from(params: SamplingParams) -> None:
    """By a repetition penalty of next to nothing."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    logits[[40, 41, 200]] = torch.inf
    check(logits, params, 3)


def test_where_nothing_may_be_drawn_it_says_so() -> None:
    with pytest.raises(ValueError, match="no token"):
        native.draw(torch.full((40,), -torch.inf), SamplingParams(), 1)
