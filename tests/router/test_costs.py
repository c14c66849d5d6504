"""What prompts cost a worker, learnt from those it computed: against the numbers they were made of."""

from __future__ import annotations

from random import Random

import pytest

from router.costs import PromptCost, PromptCostFit

TRUE = PromptCost(base_s=0.002, token_s=6e-5, pair_s=1e-8)


def taught(random: Random, lengths: tuple[int, int] = (20, 4000), count: int = 100, scale: float = 1.0) -> PromptCostFit:
    fit = PromptCostFit()
    fit.start_with(10_000.0)
    teach(fit, random, lengths, count, scale)
    return fit


def teach(fit: PromptCostFit, random: Random, lengths: tuple[int, int], count: int, scale: float = 1.0) -> None:
    for _ in range(count):
        new, cached = random.randint(*lengths), random.choice([0, random.randrange(3000)])
        fit.measured(new + cached, cached, scale * TRUE.seconds(new + cached, cached) * random.uniform(0.95, 1.05))


@pytest.mark.parametrize("seed", range(5))
def test_prompts_of_all_lengths_tell_what_any_costs(seed: int) -> None:
    cost = taught(Random(seed)).cost
    for num_tokens, num_cached in ((100, 0), (2000, 0), (4000, 0), (3000, 2800)):
        assert cost.seconds(num_tokens, num_cached) == pytest.approx(TRUE.seconds(num_tokens, num_cached), rel=0.1)


def test_prompts_that_are_all_alike_do_not_spoil_what_is_known_of_others() -> None:
    random = Random(0)
    fit = taught(random)
    teach(fit, random, (100, 100), 2000)
    assert fit.cost.seconds(4000) == pytest.approx(TRUE.seconds(4000), rel=0.3)


def test_a_worker_that_becomes_slower_is_believed() -> None:
    random = Random(0)
    fit = taught(random)
    teach(fit, random, (20, 4000), 200, scale=5.0)
    assert fit.cost.seconds(2000) == pytest.approx(5 * TRUE.seconds(2000), rel=0.2)


def test_one_prompt_that_was_held_up_says_little() -> None:
    fit = taught(Random(0))
    before = fit.cost.seconds(2000)
    fit.measured(2000, 0, 100 * before)
    assert fit.cost.seconds(2000) < 2 * before


def test_the_reported_rate_counts_until_a_prompt_was_measured() -> None:
    fit = PromptCostFit()
    fit.start_with(0.0)
    assert fit.cost == PromptCost()
    fit.start_with(2000.0)
    assert fit.cost.seconds(1000) == pytest.approx(0.5)
    fit.measured(1000, 0, 0.1)
    known = fit.cost
    fit.start_with(2000.0)
    assert fit.cost == known


@pytest.mark.parametrize(
    ("tokens", "cached", "seconds"), [(10, 10, 1.0), (10, 0, 0.0), (10, 0, float("nan")), (10, 0, float("inf")), (10, 0, -1.0)]
)
def test_what_cannot_have_been_measured_is_ignored(tokens: int, cached: int, seconds: float) -> None:
    fit = taught(Random(0))
    before = fit.cost
    fit.measured(tokens, cached, seconds)
    assert fit.cost == before


@pytest.mark.parametrize("seed", range(40))
def test_no_luck_leads_it_astray(seed: int) -> None:
    """Prompts that are nearly alike, measured with noise: it says what they take, and nothing absurd of others."""
    random = Random(seed)
    true = PromptCost(random.choice([0.0, 0.001, 0.05]), 10 ** random.uniform(-6, -3), random.choice([0.0, 1e-9, 1e-7]))
    fit = PromptCostFit()
    fit.start_with(random.choice([0.0, 100.0, 1e6]))
    low = random.randint(1, 500)
    for _ in range(300):
        num_tokens = random.randint(low, low + random.choice([1, 30, 2000]))
        fit.measured(num_tokens, 0, true.seconds(num_tokens) * random.choice([1.0, random.uniform(0.5, 2.0)]))
        assert fit.cost.seconds(4000) < 1e3 * true.seconds(4000) + 10.0
    assert 0.4 < fit.cost.seconds(low + 10) / true.seconds(low + 10) < 2.5
