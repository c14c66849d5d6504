"""Engines whose pool is quantised: hand-off from any pool, chunks, preemption, prefixes, and numbers that are not finite."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from splitfire.engine.engine import Engine
from splitfire.engine.kernels.pack import pack, pack_reference, unpack
from splitfire.engine.kernels.quantise import dequantise
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.pool import KvPool
from splitfire.engine.sequence import Purpose, SequenceSpec
from splitfire.engine.updates import SequenceUpdate
from tests.checkpoints import PICO, VOCAB, family_configs, save_checkpoint
from tests.engines import assert_no_leaks, drain, load_model, make_engine, make_spec, tokens_of

QUANTISED = ("int8", "fp8_e4m3")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return load_model(path)


@pytest.fixture(scope="module")
def pico() -> Transformer:
    return load_model(PICO)


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{seed}-{length}")
    return [draw.randrange(VOCAB) for _ in range(length)]


def prefill(engine: Engine, tokens: list[int]) -> SequenceUpdate:
    """Computes and holds a prompt; the update with its first token."""
    spec = make_spec(tokens, 99, purpose=Purpose.PREFILL)
    engine.add(spec)
    return next(u for u in drain(engine) if u.seq_id == spec.seq_id and u.tokens)


def hand_off(
    source: Engine, update: SequenceUpdate, target: Engine, spec: SequenceSpec, *, by_reference: bool = False
) -> list[int]:
    """What the services do, without them; the blocks at the target."""
    reservation = target.lending.reserve(spec)
    assert reservation is not None and reservation.num_pinned == 0
    here, there = source.runner.pool, target.runner.pool
    payload = torch.full((len(update.block_ids) * there.layout.block_bytes,), 0xFF, dtype=torch.uint8)
    pack_with = pack_reference if by_reference else pack
    sums = pack_with(here, update.block_ids, spec.num_tokens, there.layout.dtype, payload)
    received = unpack(there, reservation.block_ids, payload)
    assert received == sums
    target.lending.commit(reservation, 0, len(update.block_ids), spec.block_hashes)
    [first] = update.tokens
    ids: list[int] = list(reservation.block_ids)
    target.join(reservation, {spec.seq_id: first.token_id})
    return ids


def dequantised(pool: KvPool, block_ids: list[int] | tuple[int, ...], num_tokens: int) -> torch.Tensor:
    """[num_layers, 2, num_kv_heads, num_tokens, head_dim] fp32 of a sequence's blocks."""
    ids = list(block_ids)
    wide = pool.elements[ids].float() if pool.scales is None else dequantise(pool.elements[ids], pool.scales[ids])
    return wide.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[..., :num_tokens, :]


@pytest.mark.parametrize("source", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("target", QUANTISED)
@pytest.mark.parametrize("length", [1, 32, 77])
def test_a_sequence_goes_on_from_converted_blocks(llama: Transformer, source: str, target: str, length: int) -> None:
    """P12: bytes at decode are the reference's conversion of those at prefill; and so are the tokens after them."""
    prefiller = make_engine(llama, dtype=source)
    update = prefill(prefiller, prompt(length))
    answers = []
    for by_reference in (False, True):
        engine = make_engine(llama, dtype=target)
        spec = make_spec(prompt(length), 20)
        ids = hand_off(prefiller, update, engine, spec, by_reference=by_reference)
        answers.append((engine.runner.pool.raw[ids].clone(), tokens_of([update_of(spec, update), *drain(engine)], spec)))
        assert_no_leaks(engine)
    assert torch.equal(answers[0][0], answers[1][0])
    assert answers[0][1] == answers[1][1] and len(answers[0][1]) == 20


def update_of(spec: SequenceSpec, update: SequenceUpdate) -> SequenceUpdate:
    return replace(update, seq_id=spec.seq_id)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_keys_and_values_of_the_first_layer_are_those_of_a_local_prefill(llama: Transformer, dtype: str) -> None:
    """They depend on the tokens alone, so converting them on the way and quantising them in the cache write are one thing."""
    plain, local = make_engine(llama), make_engine(llama, dtype=dtype)
    sent, here = prefill(plain, prompt(90)), prefill(local, prompt(90))
    receiver = make_engine(llama, dtype=dtype)
    ids = hand_off(plain, sent, receiver, make_spec(prompt(90), 5))
    ours, theirs = receiver.runner.pool, local.runner.pool
    assert ours.scales is not None and theirs.scales is not None
    mine, its = list(ids), list(here.block_ids)
    for valid, block in ((32, 0), (32, 1), (26, 2)):
        a, b = ours.elements[mine[block], 0, :, :, :valid], theirs.elements[its[block], 0, :, :, :valid]
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        assert torch.equal(ours.scales[mine[block], 0, :, :, :valid], theirs.scales[its[block], 0, :, :, :valid])


@pytest.mark.parametrize("dtype", QUANTISED)
def test_what_a_quantised_cache_holds_does_not_depend_on_where_chunks_end(llama: Transformer, dtype: str) -> None:
    """Each chunk attends to its own KV as the cache holds it, not as it was before: else longer chunks would be more exact.
    What is left is the order of the additions inside a matrix product, which turns one element in thousands by one step."""
    held = []
    for chunk_tokens in (17, 64, 512):
        engine = make_engine(llama, dtype=dtype, chunk_tokens=chunk_tokens)
        update = prefill(engine, prompt(150))
        held.append((dequantised(engine.runner.pool, update.block_ids, 150), update.tokens))
    for kv, tokens in held[1:]:
        assert tokens == held[0][1]
        assert ((kv - held[0][0]).abs() > 1e-5).double().mean() < 0.002


def test_chunks_would_show_if_they_attended_to_exact_kv(llama: Transformer) -> None:
    """The test above can fail: fp32's own KV differs from the int8 cache's in most elements."""
    exact, quantised = make_engine(llama), make_engine(llama, dtype="int8")
    a, b = (prefill(engine, prompt(150)) for engine in (exact, quantised))
    kv = dequantised(exact.runner.pool, a.block_ids, 150) - dequantised(quantised.runner.pool, b.block_ids, 150)
    assert (kv.abs() > 1e-5).double().mean() > 0.5


@pytest.mark.parametrize("dtype", QUANTISED)
def test_preemption_and_prefixes_work_in_a_quantised_pool(llama: Transformer, dtype: str) -> None:
    roomy, tight = make_engine(llama, dtype=dtype, num_blocks=64), make_engine(llama, dtype=dtype, num_blocks=9)
    answers = []
    for engine in (roomy, tight):
        specs = [make_spec(prompt(60, i), 40) for i in range(4)]
        for spec in specs:
            engine.add(spec)
        updates = drain(engine)
        answers.append([tokens_of(updates, spec) for spec in specs])
        assert_no_leaks(engine)
    assert tight._scheduler.num_preemptions > 0
    assert answers[0] == answers[1]
    again = make_spec([*prompt(60, 0), *answers[0][0]], 8)
    roomy.add(again)
    updates = drain(roomy)
    assert next(u.num_cached for u in updates if u.tokens) == 96
    fresh, same = make_engine(llama, dtype=dtype), make_spec([*prompt(60, 0), *answers[0][0]], 8)
    fresh.add(same)
    assert tokens_of(updates, again) == tokens_of(drain(fresh), same)


def test_kv_that_is_not_finite_ends_its_own_sequence_only(llama: Transformer) -> None:
    """F75 with int8: a NaN scale makes NaN logits, which end that request; its batch mate never notices."""
    engine = make_engine(llama, dtype="int8")
    alone = make_spec(prompt(40), 10)
    engine.add(alone)
    expected = tokens_of(drain(engine), alone)
    good, bad = make_spec(prompt(40), 10), make_spec(prompt(40, 9), 10)
    engine.add(good)
    engine.add(bad)
    updates = list(engine.step().updates)
    assert engine.runner.pool.scales is not None
    sequence = engine._sequences.get(bad.seq_id)
    assert sequence is not None
    engine.runner.pool.scales[sequence.block_ids[0], 1, 0, 0, 3] = torch.nan
    updates += drain(engine)
    assert [u.error for u in updates if u.seq_id == bad.seq_id and u.is_finished] == ["nonfinite_logits"]
    assert tokens_of(updates, good) == expected
    assert_no_leaks(engine)


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 0.8), ("fp16", 0.9), ("int8", 0.7), ("fp8_e4m3", 0.4)])
def test_pico_says_much_the_same(pico: Transformer, dtype: str, least: float) -> None:
    """Greedy tokens before the first one that differs from fp32's. benchmarks/quality.py has the numbers over 100 prompts."""
    answers = []
    for pool_dtype in ("fp32", dtype):
        engine = make_engine(pico, dtype=pool_dtype)
        specs = [make_spec(prompt(n, 3), 32) for n in (20, 60, 100, 140, 180, 220)]
        for spec in specs:
            engine.add(spec)
        updates = drain(engine)
        answers.append([tokens_of(updates, spec) for spec in specs])
    shares = []
    for exact, ours in zip(*answers, strict=True):
        same = [a == b for a, b in zip(exact, ours, strict=True)]
        shares.append(same.index(False) / 32 if False in same else 1.0)
    assert sum(shares) / len(shares) >= least, shares
