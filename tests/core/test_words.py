"""Hashes, fingerprints, layouts, lifecycle tables: what everything else is named by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitfire.core.errors import Mismatch
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.hashing import chain_root, hash_blocks
from splitfire.core.layout import BLOCK_ALIGN, DTYPE_BYTES, KvLayout
from splitfire.core.lifecycle import REQUEST, SEQUENCE, IllegalTransition, Req, ReqEvent, Seq, SeqEvent, advance
from splitfire.core.sampling import SamplingParams, StopParams, TokenBias
from splitfire.core.wire import (
    fingerprint_from_wire,
    fingerprint_to_wire,
    layout_from_wire,
    layout_to_wire,
    sampling_from_wire,
    sampling_to_wire,
    stopping_from_wire,
    stopping_to_wire,
)

PRINT = Fingerprint(b"w" * 32, b"c" * 32, b"t" * 32, b"r" * 32, "plain", 32)
LAYOUT = KvLayout("fp32", 6, 2, 64, 32)


def test_a_blocks_name_depends_on_everything_before_it() -> None:
    tokens = list(range(100))
    root = chain_root(b"", b"model", "")
    names = hash_blocks(root, tokens, 16)
    assert len(names) == len(set(names)) == 6
    assert hash_blocks(root, tokens[:48], 16) == names[:3]
    changed = [*tokens[:20], 999, *tokens[21:]]
    assert hash_blocks(root, changed, 16)[0] == names[0]
    assert not set(hash_blocks(root, changed, 16)[1:]) & set(names)
    for other in (chain_root(b"s", b"model", ""), chain_root(b"", b"other", ""), chain_root(b"", b"model", "a")):
        assert not set(hash_blocks(other, tokens, 16)) & set(names)


def test_roots_do_not_run_together() -> None:
    assert chain_root(b"ab", b"c", "") != chain_root(b"a", b"bc", "") != chain_root(b"", b"ab", "c")


@pytest.mark.parametrize("field", ["weights", "config", "tokenizer", "rope", "weight_format", "block_size", "protocol_major"])
def test_a_fingerprint_mismatch_is_named(field: str) -> None:
    """F66."""
    value = getattr(PRINT, field)
    change: dict[str, Any] = {field: b"x" * 32 if isinstance(value, bytes) else "int8" if isinstance(value, str) else 64}
    other = replace(PRINT, **change)
    assert other.digest != PRINT.digest
    with pytest.raises(Mismatch, match=f"{field} differs: here has .*, there has ") as caught:
        PRINT.require_equal(other, "here", "there")
    assert caught.value.reason == f"fingerprint_{field}"
    PRINT.require_equal(replace(PRINT), "here", "there")


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("block_size", [8, 16, 32, 256])
def test_blocks_are_aligned(dtype: str, block_size: int) -> None:
    layout = KvLayout(dtype, 1, 1, 8, block_size)
    assert layout.block_bytes % BLOCK_ALIGN == 0
    assert layout.token_bytes * block_size == layout.block_bytes
    assert layout.scale_offset <= layout.content_bytes <= layout.block_bytes < layout.content_bytes + BLOCK_ALIGN


def test_a_quantised_block_is_elements_then_scales_then_padding() -> None:
    layout = KvLayout("int8", num_layers=3, num_kv_heads=1, head_dim=24, block_size=8)
    assert (layout.scale_offset, layout.num_scales, layout.content_bytes, layout.block_bytes) == (1152, 48, 1248, 1280)
    assert replace(layout, dtype="fp8_e4m3").block_bytes == 1280
    wide = replace(layout, dtype="bf16")
    assert (wide.is_quantised, wide.num_scales, wide.content_bytes, wide.block_bytes) == (False, 0, 2304, 2304)


def test_dtypes_keep_their_numbers_on_the_wire() -> None:
    assert list(DTYPE_BYTES) == ["bf16", "fp16", "fp32", "int8", "fp8_e4m3"]


def test_layouts_convert_when_only_precision_differs() -> None:
    assert LAYOUT.converts_to(replace(LAYOUT, dtype="bf16"))
    assert not LAYOUT.converts_to(replace(LAYOUT, block_size=16))
    assert not LAYOUT.converts_to(replace(LAYOUT, dtype="int3"))


def test_what_goes_over_the_wire_comes_back() -> None:
    sampling = SamplingParams(0.5, 0.9, 7, 0.1, 1.2, -0.5, 0.25, 2**63 - 1, (TokenBias(3, -1.5), TokenBias(9, 2.0)), 0)
    assert sampling_from_wire(sampling_to_wire(sampling)) == sampling
    assert sampling_from_wire(sampling_to_wire(SamplingParams())) == SamplingParams()
    stopping = StopParams(10, 2, frozenset({4, 1}))
    assert stopping_from_wire(stopping_to_wire(stopping)) == stopping
    assert fingerprint_from_wire(fingerprint_to_wire(PRINT)) == PRINT
    assert layout_from_wire(layout_to_wire(LAYOUT)) == LAYOUT


def test_illegal_transitions_raise_and_change_nothing() -> None:
    with pytest.raises(IllegalTransition, match=r"HOLD is not possible in Seq.WAITING"):
        advance(SEQUENCE, Seq.WAITING, SeqEvent.HOLD)
    with pytest.raises(IllegalTransition):
        advance(REQUEST, Req.DONE, ReqEvent.TOKEN)


@pytest.mark.parametrize(("table", "start"), [(SEQUENCE, Seq.WAITING), (REQUEST, Req.ACCEPTED)])
def test_every_state_is_in_its_table_and_can_be_reached(table: dict[Any, dict[Any, Any]], start: Any) -> None:
    assert set(table) == set(start.__class__)
    reached = {start}
    while more := {after for state in reached for after in table[state].values()} - reached:
        reached |= more
    assert reached == set(table)


def test_every_choice_can_end_from_every_open_state() -> None:
    """R10: cancel and failure are first-class events."""
    for state, following in REQUEST.items():
        if following:
            assert following[ReqEvent.CANCEL] is Req.CANCELLED
            assert following[ReqEvent.FAIL] is Req.FAILED
