"""The router's benchmark: its engines behave as they are said to, and its processes find one another."""

from __future__ import annotations

import pytest

from benchmarks.router.engine import PrefixCache, Speed
from benchmarks.router.fake_worker import FleetShape
from benchmarks.router.load import Ask, errors_of
from benchmarks.router.rig import rig, wait_until_quiet
from benchmarks.router.w8 import BLOCK_SIZE, prompts_of


def test_a_cache_keeps_what_was_used_last_and_of_a_prompt_its_beginning() -> None:
    cache = PrefixCache(4)
    assert cache.add((1, 2, 3)).stored == (1, 2, 3)
    assert cache.depth((1, 2, 9)) == 2
    assert cache.add((1, 7)).removed == ()
    change = cache.add((8, 9))
    assert (change.stored, change.removed) == ((8, 9), (3, 2)), "the last block of the oldest prompt first"
    assert cache.depth((1, 7)) == 2


def test_a_cache_without_room_says_nothing_was_stored() -> None:
    assert PrefixCache(0).add((1, 2)).stored == ()


def test_equal_prefixes_of_w8_are_equal_ids_and_equal_words() -> None:
    prompts = prompts_of(0, 1.0)
    assert len(prompts) == 400
    begins: dict[tuple[int, ...], int] = {}
    for prompt in prompts:
        begins[tuple(prompt.ids[:BLOCK_SIZE])] = begins.get(tuple(prompt.ids[:BLOCK_SIZE]), 0) + 1
    assert sum(1 for count in begins.values() if count == 1) == 80, "the unique ones share nothing"
    assert max(begins.values()) > 60


@pytest.mark.parametrize("is_bare", [False, True])
def test_fake_workers_answer_every_token_and_keep_nothing(is_bare: bool) -> None:
    """Through the router, and through the relay that is its floor."""
    with rig(FleetShape(1, 1, Speed(tokens_per_step=8)), is_bare=is_bare) as made:
        answers = made.all("closed", Ask(300, 0, 20), 4, 0.2)
        assert answers
        assert not errors_of(answers)
        assert {a.num_tokens for a in answers} == {20}
        if not is_bare:
            wait_until_quiet(made, 5.0)
