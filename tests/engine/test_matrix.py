"""Tokens of a sequence beside others are those it gets alone (P11), under combinations of all that may differ meanwhile: chunks,
prefix cache, room, who drafts, and where its prompt was computed. KV of each precision is compared with the same precision alone.

Between processes and over real transports the same is asked in tests/e2e/test_generate.py and test_handoff.py.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from splitfire.core.sampling import SamplingParams
from splitfire.engine.engine import Engine
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.runner import Model
from splitfire.engine.sequence import Purpose, SequenceSpec
from splitfire.engine.speculation.speculator import BatchSpeculator, Sources
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import VOCAB, family_configs, save_checkpoint
from tests.engine.speculation.rig import Always, make_draft_model, make_speculator
from tests.engines import (
    GREEDY,
    assert_no_leaks,
    drain,
    load_compiled,
    load_model,
    make_engine,
    make_spec,
    needs_compiled,
    tokens_of,
)

BLOCK = 16
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=3, frequency_penalty=0.2)
draw = random.Random(4)
STEM = [draw.randrange(VOCAB) for _ in range(12)] * 4  # repeats, so that lookup has something to propose


@dataclass(frozen=True)
class Case:
    """One way to run the same requests."""

    chunk_tokens: int
    caches_prefixes: bool
    is_tight: bool  # so that sequences are preempted
    drafter: str
    is_handed_off: bool


AXES: dict[str, tuple[object, ...]] = {
    "chunk_tokens": (17, 512),
    "caches_prefixes": (False, True),
    "is_tight": (False, True),
    "drafter": ("nobody", "lookup", "predicted", "model"),
    "is_handed_off": (False, True),
}


def covering(strength: int) -> list[Case]:
    """Cases among which every combination of values of any `strength` axes occurs."""
    everything = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]

    def combinations(case: dict[str, object]) -> set[tuple[tuple[str, object], ...]]:
        return set(itertools.combinations(case.items(), strength))

    missing = set().union(*(combinations(case) for case in everything))
    cases = []
    while missing:
        best = max(everything, key=lambda case: len(combinations(case) & missing))
        missing -= combinations(best)
        cases.append(Case(**best))  # type: ignore[arg-type]
    return cases


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return path


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Transformer:
    return load_model(checkpoint)


def requests() -> list[SequenceSpec]:
    """Some share a beginning; the last is of a higher class."""
    asked = [
        (STEM[:40], 44, GREEDY),
        ([*STEM[:33], 9, 8], 40, SAMPLED),
        (STEM[5:26], 3, GREEDY),
        ([*STEM, *STEM[:22]], 20, SAMPLED),
    ]
    made = [make_spec(tokens, count, block_size=BLOCK, sampling=sampling) for tokens, count, sampling in asked]
    return [*made, make_spec([7], 24, block_size=BLOCK, sampling=SAMPLED, priority=1)]


def answers_alone(model: Model, dtype: str) -> list[list[int]]:
    answers = []
    for spec in requests():
        engine = make_engine(model, dtype=dtype, block_size=BLOCK)
        engine.add(spec)
        answers.append(tokens_of(drain(engine), spec))
    return answers


def edited(tokens: Seq[int]) -> tuple[int, ...]:
    """Resembles the answer: a token replaced, one inserted, two left out."""
    return (*tokens[:6], 7, *tokens[7:13], 8, *tokens[15:])


def speculator(drafter: str, draft: Transformer) -> BatchSpeculator | None:
    if drafter == "nobody":
        return None
    sources = Sources(lookup=drafter == "lookup", predicted=drafter == "predicted")
    return make_speculator(Always(), sources=sources, draft_model=make_draft_model(draft) if drafter == "model" else None)


def hand_off(source: Engine, target: Engine, spec: SequenceSpec) -> list[SequenceUpdate]:
    """Computes the prompt there and lets it go on here; what happened here until there was room for it, and its first token."""
    prefill = replace(spec, purpose=Purpose.PREFILL)
    source.add(prefill)
    update = next(u for u in drain(source) if u.tokens)
    updates: list[SequenceUpdate] = []
    while (reservation := target.lending.reserve(spec)) is None:
        assert target.has_work
        updates += target.step().updates
    first = reservation.num_pinned
    target.runner.pool.raw[reservation.block_ids[first:]] = source.runner.pool.raw[list(update.block_ids[first:])]
    target.lending.commit(reservation, first, len(reservation.block_ids) - first, spec.block_hashes)
    target.join(reservation, {spec.seq_id: update.tokens[0].token_id})
    source.finish(spec.seq_id)
    return [*updates, update]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("body", "strength"), [(load_model, 2), pytest.param(load_compiled, 3, marks=needs_compiled)], ids=["torch", "compiled"]
)
def test_tokens_are_those_it_gets_alone(
    body: Callable[[Path], Model], strength: int, dtype: str, checkpoint: Path, plain: Transformer
) -> None:
    model = body(checkpoint)
    answers = answers_alone(model, dtype)
    num_preemptions = num_cached = num_accepted = num_rejected = 0
    for case in covering(strength):
        engine = make_engine(
            model, dtype=dtype, block_size=BLOCK, num_blocks=8 if case.is_tight else 64, chunk_tokens=case.chunk_tokens,
            speculator=speculator(case.drafter, plain), caches_prefixes=case.caches_prefixes,
        )  # fmt: skip
        source = make_engine(model, dtype=dtype, block_size=BLOCK, chunk_tokens=case.chunk_tokens)
        specs = [replace(spec, predicted=edited(answer)) for spec, answer in zip(requests(), answers, strict=True)]
        leaving = make_spec(STEM[3:30], 60, block_size=BLOCK)
        engine.add(leaving)
        updates: list[SequenceUpdate] = []
        for spec in specs:  # they join at different steps, and leave at different ones
            if case.is_handed_off:
                updates += hand_off(source, engine, spec)
            else:
                engine.add(spec)
            updates += [*engine.step().updates, *engine.step().updates]
        engine.finish(leaving.seq_id)
        updates += drain(engine)
        assert [tokens_of(updates, spec) for spec in specs] == answers, case
        assert_no_leaks(engine)
        assert_no_leaks(source)
        num_preemptions += engine._scheduler.num_preemptions
        num_cached += sum(u.num_cached for u in updates)
        counts = engine.draft_counts().values()
        num_accepted += sum(c.num_accepted for c in counts)
        num_rejected += sum(c.num_drafted - c.num_accepted for c in counts)
    assert min(num_preemptions, num_cached, num_accepted, num_rejected) > 0


def test_the_cases_have_every_combination_they_promise() -> None:
    assert [field.name for field in fields(Case)] == list(AXES)
    for strength, most in ((2, 10), (3, 24)):
        cases = covering(strength)
        assert len(cases) <= most
        for names in itertools.combinations(AXES, strength):
            found = {tuple(getattr(case, name) for name in names) for case in cases}
            assert found == set(itertools.product(*(AXES[name] for name in names)))
