"""The sampler is a function, and it draws from the right distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from splitfire.core.sampling import SamplingParams, TokenBias
from splitfire.engine.kernels.sample import GUMBEL_MAX, GUMBEL_MIN, SampleRow, gumbel, noise_key, sample

VOCAB = 50


def row(
    position: int = 0,
    choice: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    blocked: tuple[int, ...] = (),
    allowed: set[int] | None = None,
    **changes: Any,
) -> SampleRow:
    mask = mask_of(allowed) if allowed is not None else None
    return SampleRow(SamplingParams(**changes), choice, position, prompt, output, frozenset(blocked), mask)


def mask_of(allowed: set[int]) -> torch.Tensor:
    """As a grammar writes it: one bit a token."""
    words = [sum(1 << bit for bit in range(32) if 32 * word + bit in allowed) for word in range(-(-VOCAB // 32))]
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32)


def draws(logits: torch.Tensor, count: int, **changes: Any) -> torch.Tensor:
    """Share of each token among `count` positions."""
    rows = [row(position, seed=11, **changes) for position in range(count)]
    tokens = [t.token_id for t in sample(logits.expand(count, -1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel()) / count


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_from_the_softmax(logits: torch.Tensor, temperature: float) -> None:
    count = 20_000
    share = draws(logits, count, temperature=temperature)
    expected = (logits / temperature).softmax(-1)
    # Five standard deviations of a binomial share.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_filters_keep_what_they_should(logits: torch.Tensor) -> None:
    ranked = logits.argsort(descending=True).tolist()
    probabilities = logits.softmax(-1)
    assert set(draws(logits, 2000, top_k=3).nonzero().flatten().tolist()) == set(ranked[:3])
    kept, total = set(), 0.0
    for token in ranked:
        kept.add(token)
        total += float(probabilities[token])
        if total >= 0.6:
            break
    assert set(draws(logits, 4000, top_p=0.6).nonzero().flatten().tolist()) == kept
    floor = float(probabilities.max()) * 0.3
    likely = {t for t in range(VOCAB) if probabilities[t] >= floor}
    assert set(draws(logits, 4000, min_p=0.3).nonzero().flatten().tolist()) == likely


def kept_by(probabilities: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """What the filters leave of a distribution, written down from their definitions, one after the other."""
    left = probabilities.double()
    if top_k:
        left = torch.where(left >= left.topk(top_k).values[-1], left, 0)
        left /= left.sum()
    ranked, order = left.sort(descending=True)
    before = ranked.cumsum(0) - ranked
    left[order[before >= top_p]] = 0
    left = torch.where(left >= min_p * left.max(), left, 0)
    return left / left.sum()


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}],
    ids=lambda filters: "-".join(filters) or "none",
)
@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_over_seeds_tokens_come_as_often_as_the_filters_leave_them(
    logits: torch.Tensor, temperature: float, filters: dict[str, Any]
) -> None:
    """Chi-square, at most five standard deviations over its mean; choices and positions vary along with the seeds."""
    count = 5000
    rows = [row(i % 7, choice=i % 3, seed=1000 + i, temperature=temperature, **filters) for i in range(count)]
    seen = torch.bincount(torch.tensor([t.token_id for t in sample(logits.expand(count, -1), rows)]), minlength=VOCAB).double()
    expected = count * kept_by((logits / temperature).softmax(-1), **filters)
    assert seen[expected == 0].sum() == 0
    likely = expected >= 5
    rare_seen, rare_expected = seen[~likely].sum(), expected[~likely].sum()
    cells = [*zip(seen[likely].tolist(), expected[likely].tolist(), strict=True)]
    if rare_expected >= 5:
        cells.append((float(rare_seen), float(rare_expected)))
    degrees = len(cells) - 1
    assert degrees >= 3
    assert sum((a - b) ** 2 / b for a, b in cells) <= degrees + 5 * (2 * degrees) ** 0.5


def test_a_tiny_top_p_is_greedy(logits: torch.Tensor) -> None:
    assert draws(logits, 50, top_p=1e-6)[logits.argmax()] == 1.0


def test_noise_only_where_it_matters_changes_nothing(logits: torch.Tensor) -> None:
    """The shortcut of `_draw` against noise for every token."""
    every = torch.arange(VOCAB)
    for position in range(300):
        expected = int((logits.double() + gumbel(noise_key(5, 0, position), every)).argmax())
        assert sample(logits[None], [row(position, seed=5)])[0].token_id == expected


def test_noise_stays_within_its_bounds() -> None:
    noise = gumbel(noise_key(1, 2, 3), torch.arange(500_000))
    assert float(noise.min()) >= GUMBEL_MIN - 1e-9
    assert float(noise.max()) <= GUMBEL_MAX + 1e-9
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.01


def test_rows_do_not_influence_one_another(logits: torch.Tensor) -> None:
    rows = [row(i, temperature=0.0 if i % 3 == 0 else 1.0, seed=i, top_p=0.9) for i in range(30)]
    together = [t.token_id for t in sample(logits.expand(30, -1), rows)]
    alone = [sample(logits[None], [r])[0].token_id for r in rows]
    assert together == alone


def test_greedy_is_the_argmax_and_a_tiny_temperature_is_greedy(logits: torch.Tensor) -> None:
    for temperature in (0.0, 5e-324, 1e-5):
        assert sample(logits[None], [row(temperature=temperature)])[0].token_id == int(logits.argmax())


def test_penalties_follow_their_definitions(logits: torch.Tensor) -> None:
    top, second = logits.topk(2).indices.tolist()
    assert float(logits[top]) > 0
    assert sample(logits[None], [row(temperature=0.0, prompt=(top,), repetition_penalty=50.0)])[0].token_id == second
    assert sample(logits[None], [row(temperature=0.0, prompt=(top,), presence_penalty=2.0)])[0].token_id == top, (
        "prompts do not count"
    )
    gap = float(logits[top] - logits[second])
    often = (top,) * 40
    assert sample(logits[None], [row(temperature=0.0, output=often, frequency_penalty=gap / 40 * 1.01)])[0].token_id == second
    assert sample(logits[None], [row(temperature=0.0, output=often, frequency_penalty=gap / 40 * 0.99)])[0].token_id == top


def test_bias_and_blocked_tokens(logits: torch.Tensor) -> None:
    assert sample(logits[None], [row(temperature=0.0, logit_bias=(TokenBias(7, 100.0),))])[0].token_id == 7
    top = int(logits.argmax())
    assert sample(logits[None], [row(temperature=0.0, blocked=(top,))])[0].token_id != top


@pytest.mark.parametrize(
    "changes",
    [
        dict(temperature=0.0),
        dict(),
        dict(top_k=3),
        dict(top_p=0.5),
        dict(min_p=0.5),
        dict(temperature=5.0, top_k=1),
        dict(logit_bias=(TokenBias(4, 100.0),)),
        dict(repetition_penalty=3.0, presence_penalty=2.0, prompt=(1, 2), output=(3, 31)),
    ],
)
@pytest.mark.parametrize("allowed", [{0, 3, 31, 32, 40, VOCAB - 1}, {31}, {VOCAB - 1}, {5, 6, 7}])
def test_only_what_a_grammar_allows_is_drawn(logits: torch.Tensor, allowed: set[int], changes: dict[str, Any]) -> None:
    """Also when it allows fewer tokens than a filter would keep, and none of the likely ones."""
    rows = [row(position, allowed=allowed, seed=5, **changes) for position in range(40)]
    drawn = {t.token_id for t in sample(logits.expand(40, -1) - 50 * (torch.arange(VOCAB) == min(allowed)), rows)}
    assert drawn <= allowed


def test_a_mask_that_allows_everything_changes_nothing(logits: torch.Tensor) -> None:
    for changes in (dict(temperature=0.0), dict(top_k=7, top_p=0.9), dict(frequency_penalty=1.0, output=(3, 3))):
        for position in range(20):
            free = row(position, seed=9, logprobs=3, **changes)
            held = row(position, seed=9, logprobs=3, allowed=set(range(VOCAB)), **changes)
            assert sample(logits[None], [free]) == sample(logits[None], [held])


def test_masked_tokens_are_drawn_from_the_softmax_of_the_rest(logits: torch.Tensor) -> None:
    count, allowed = 8000, {2, 5, 30, 33, 41}
    rows = [row(position, seed=12, allowed=allowed) for position in range(count)]
    share = torch.bincount(torch.tensor([t.token_id for t in sample(logits.expand(count, -1), rows)]), minlength=VOCAB) / count
    keep = torch.tensor([token in allowed for token in range(VOCAB)])
    expected = logits.masked_fill(~keep, float("-inf")).softmax(-1)
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_logprobs_are_the_models_own(logits: torch.Tensor) -> None:
    [token] = sample(logits[None], [row(temperature=3.0, seed=2, logprobs=4, logit_bias=(TokenBias(1, 5.0),))])
    expected = logits.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    assert [t.token_id for t in token.top] == expected.topk(4).indices.tolist()
    assert sample(logits[None], [row(logprobs=0)])[0].top == ()
    assert sample(logits[None], [row()])[0].logprob is None
