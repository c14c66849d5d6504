"""Greedy fp32 tokens equal transformers', for every family, whatever the chunks, blocks and batches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from splitfire.engine.runner import Model
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import VOCAB, assert_greedy, family_configs, save_checkpoint
from tests.engines import assert_no_leaks, drain, load_compiled, load_model, make_engine, make_spec, needs_compiled, tokens_of

FAMILIES = sorted(family_configs())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("body", [load_model, pytest.param(load_compiled, marks=needs_compiled)], ids=["torch", "compiled"])
@pytest.mark.parametrize(("block_size", "chunk_tokens"), [(32, 512), (8, 17)])
def test_tokens_equal_transformers(
    family: str, body: Callable[[Path], Model], block_size: int, chunk_tokens: int, tmp_path: Path
) -> None:
    oracle = save_checkpoint(family_configs()[family], tmp_path)
    engine = make_engine(body(tmp_path), block_size=block_size, chunk_tokens=chunk_tokens, num_blocks=1024 // block_size * 5)
    draw = random.Random(family)
    specs = []
    for length in (1, 2, block_size - 1, block_size, block_size + 1, 100, 333, 600):
        prompt = [draw.randrange(VOCAB) for _ in range(length)]
        specs.append(make_spec(prompt, 4 + length % 7, block_size=block_size))
    updates: list[SequenceUpdate] = []
    for spec in specs:  # they join at different steps, and leave at different ones
        engine.add(spec)
        updates += engine.step().updates
    updates += drain(engine)
    for spec in specs:
        tokens = tokens_of(updates, spec)
        assert len(tokens) == spec.stopping.max_tokens
        assert_greedy(oracle, spec.prompt, tokens)
    assert_no_leaks(engine)
