"""Floors are arithmetic that claims rest on: checked against numbers worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.engine.__main__ import VARIANTS
from benchmarks.engine.floors import decode, prefill, weight_bytes
from benchmarks.engine.loaded import LoadedEngine, Variant
from benchmarks.engine.machine import Machine
from benchmarks.engine.rows import Measured, rows_of
from splitfire.core.layout import KvLayout
from splitfire.core.model_config import ModelConfig, parse_config
from tests.checkpoints import PICO

SMOL135: dict[str, object] = dict(
    model_type="llama", num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192,
    rms_norm_eps=1e-5, torch_dtype="bfloat16", eos_token_id=0, bos_token_id=0,
)  # fmt: skip


def config(**changes: object) -> ModelConfig:
    return parse_config({**SMOL135, **changes}, None)


def layout(dtype: str) -> KvLayout:
    return KvLayout(dtype, 30, 3, 64, 32)


def test_floors_of_the_shape_that_all_numbers_are_about() -> None:
    num_bytes = weight_bytes(config(), "", "auto")
    assert num_bytes == pytest.approx(269e6, rel=0.001)  # the size of its checkpoint
    work = decode(config(), layout("bf16"), num_bytes, streams=16, context=300, is_int8=False)
    assert work.kv_bytes == 16 * 300 * 30 * 2 * 3 * 64 * 2  # 23 KB a token
    machine = Machine(43e9, 932e9, 0.0)
    assert work.floor_s(machine) == pytest.approx(8.9e-3, rel=0.02)
    assert prefill(config(), layout("bf16"), num_bytes, 2048, is_int8=False).floor_s(machine) == pytest.approx(0.62, rel=0.02)


def test_an_embedding_that_is_not_the_output_is_not_read() -> None:
    assert weight_bytes(config(tie_word_embeddings=False), "", "auto") == weight_bytes(config(), "", "auto")


def test_an_engine_that_widens_its_weights_has_the_floor_of_the_narrow_ones() -> None:
    assert weight_bytes(config(), "", "auto") * 2 == weight_bytes(config(), "", "fp32") == weight_bytes(config(), "int8", "") * 4


def test_int8_weights_are_held_against_int8_products() -> None:
    machine = Machine(1e15, 100.0, 400.0)
    assert machine.ops_per_s(is_int8=True) == 400 and machine.ops_per_s(is_int8=False) == 100
    work = prefill(config(), layout("bf16"), 1, 100, is_int8=True)
    assert work.floor_s(machine) == pytest.approx(work.num_ops / 400)


def test_a_machine_counts_by_the_median_of_each_of_its_measures() -> None:
    assert Machine.median([Machine(4, 7, 1), Machine(2, 9, 3), Machine(40, 8, 2)]) == Machine(4, 8, 2)


def test_variants_are_engines_that_decode_and_prefill() -> None:
    """In process, as a worker loads them; and rows come out of it."""
    taken = {}
    for name, flags in (("bf16", ("--kv-dtype=bf16",)), ("bf16, KV int8", ("--kv-dtype=int8",))):
        engine = LoadedEngine(Variant(name, flags), str(PICO), [0], num_tokens=4 * 128)
        times = engine.decode(streams=3, context=60, num_steps=4)
        assert len(times) == 4 and min(times) > 0
        taken[name] = Measured(
            engine.settings, engine.loaded.model.config, engine.loaded.layout, {(300, 1): times}, {64: [engine.prefill(64, 1)]}
        )
        engine.engine.blocks.check()
        assert engine.engine.load().running == 0
    machine = Machine(1e9, 1e12, 1e12)
    rows = rows_of(taken, {(300, 1): machine, 64: machine}, "bf16")
    assert [r.target for r in rows if r.target] == ["at most 1.25x its floor", "at least 1.9x the tokens"]
    assert {r.case for r in rows} >= {"bf16: decode, 1 streams at 300", "bf16, KV int8: prefill, 64 tokens"}


def test_a_flag_that_workers_do_not_have_is_named() -> None:
    assert Variant("x", ("--kv-dtype=bf16", "--no-such-flag=1")).missing_flag() == "--no-such-flag=1"
    assert not VARIANTS[0].missing_flag()
