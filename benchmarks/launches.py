"""What the engine launches on a GPU, recorded: each op is called with meta tensors in every configuration that ships, so that
kernels.py compiles what serving would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from splitfire.core.layout import KvLayout
from splitfire.engine.kernels.gpu import chips
from splitfire.engine.kernels.gpu.adjust import Adjustments, adjust
from splitfire.engine.kernels.gpu.attend_decode import DecodeShape, Partials, attend_decode, decode_shape
from splitfire.engine.kernels.gpu.attend_prefill import attend_prefill
from splitfire.engine.kernels.gpu.attend_shared import Shared, attend_shared
from splitfire.engine.kernels.gpu.chips import Chip
from splitfire.engine.kernels.gpu.draw_rows import LaneParameters, draw_rows
from splitfire.engine.kernels.gpu.linear import linear
from splitfire.engine.kernels.gpu.norm import add_rms_norm, silu_mul
from splitfire.engine.kernels.gpu.pack import pack, unpack
from splitfire.engine.kernels.gpu.prepare import num_words, prepare, settle
from splitfire.engine.kernels.gpu.rope_norm_write import rope_norm_write
from splitfire.engine.kernels.gpu.row_states import RowStates
from splitfire.engine.kernels.gpu.sample import DrawRows, draw
from splitfire.engine.kernels.gpu.spans import Cut, Spans, cut
from splitfire.engine.kernels.linear import GroupedMatrix, Int8Matrix, Matrix
from splitfire.engine.kernels.rope import CacheTargets, QkNorm, Rotation
from splitfire.engine.pool import KvPool, LayerCache

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64", int: "i32", float: "fp32",
}  # fmt: skip

# Of Llama-3.1-8B; heads of 80 stand for all that are padded to 128, also 96.
HEADS, KV_HEADS, LAYERS, WIDTH, VOCAB = 32, 8, 32, 4096, 128256
POOLS, DIMS = ("bf16", "int8", "fp8_e4m3"), (128, 64, 80)
BLOCK_SIZE, TOKENS, SEQUENCES, MULTIPROCESSORS = 32, 256, 128, 132


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as something calls it: types of its arguments, and what it knows when it is compiled."""

    name: str
    module: str
    function: str
    # "i64", or "i64:16" for a multiple of 16; pointers always are; a named tuple of types; None of what is None.
    types: dict[str, Any]
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)
    has_products: bool = False


def recorded(target: Chip, name: str, op: Callable[[], object], products: tuple[str, ...] = ()) -> Iterator[Launch]:
    """What `op`, called with meta tensors, would launch on `target`; `products` are the kernels that should use tensor cores."""
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {key: options.pop(key) for key in kernel.arg_names if key in options}
        constants = {p.name: given.pop(p.name) for p in kernel.params if p.is_constexpr}
        types, function = {key: type_of(value) for key, value in given.items()}, kernel.__name__
        title = f"{kernel.__module__.rpartition('.')[2]}.{function.strip('_')} {name}".strip()
        found.append(Launch(title, kernel.__module__, function, types, constants, options, function in products))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(chips, "chip_of", return_value=target):
        op()
    yield from found


def type_of(value: Any) -> Any:
    """As Triton's launcher would have it."""
    if isinstance(value, tuple):
        return type(value)(*map(type_of, value))
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    if isinstance(value, int) and value % 16 == 0:
        return "i32:16"
    return value if value is None else TYPES[type(value)]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(target: Chip) -> Iterator[Launch]:
    for pool, dim in itertools.product(POOLS, DIMS):
        cache = KvPool(KvLayout(pool, LAYERS, KV_HEADS, dim, BLOCK_SIZE), 8, torch.device("meta")).layer(0)
        yield from attention_launches(target, f"{pool} D{dim}", cache)
        yield from write_launches(target, f"{pool} D{dim}", cache)
    yield from small_launches(target)
    yield from linear_launches(target)
    yield from handoff_launches(target)
    yield from step_launches(target)


def attention_launches(target: Chip, name: str, cache: LayerCache) -> Iterator[Launch]:
    dim, group, scale = cache.elements.shape[-1], HEADS // KV_HEADS, 0.1
    q, out, place = meta(TOKENS, HEADS, dim), meta(TOKENS, HEADS, dim), meta(SEQUENCES, dtype=torch.int32)
    spans = Spans(place, place, place, place, meta(SEQUENCES, 1024, dtype=torch.int32))
    groups = Spans(place, place, place, place, spans.tables, members=meta(TOKENS, dtype=torch.int32))
    whole, rest = Cut(place, place), Cut(place, place, starts=place)
    states = RowStates.of(TOKENS, HEADS, dim, q.device)

    def decode(shape: DecodeShape, cut: Cut, window: int | None, shared: RowStates | None = None) -> Callable[[], object]:
        partials = Partials.of(shape, dim, q.device)
        return partial(attend_decode, q, cache, spans, cut, shape, partials, scale, window, out, shared)

    for window, rows in itertools.product((None, 4096) if dim in (64, 128) else (None,), (1, 8, 16)):
        shape = decode_shape(group, rows, MULTIPROCESSORS)
        title = f"{name} rows {shape.rows}{' window' if window else ''}"
        yield from recorded(target, title, decode(shape, whole, window), ("_attend",))
        if window is None:
            yield from recorded(target, f"{title} after shared", decode(shape, rest, None, states), ("_attend",))
        if rows == 1:
            title = f"{name}{' window' if window else ''}"
            yield from recorded(target, title, partial(attend_prefill, q, cache, spans, whole, 9, scale, window, out), ("_attend",))
    shape = decode_shape(group, TOKENS, MULTIPROCESSORS)
    shared = Shared(groups, whole, shape, Partials.of(shape, dim, q.device), states)
    yield from recorded(target, f"{name} shared", partial(attend_shared, q, cache, shared, scale), ("_attend",))


def write_launches(target: Chip, name: str, cache: LayerCache) -> Iterator[Launch]:
    dim = cache.elements.shape[-1]
    qkv, angles = meta(TOKENS, HEADS + 2 * KV_HEADS, dim), meta(TOKENS, 1, dim // 2, dtype=torch.float32)
    targets = CacheTargets(meta(TOKENS, dtype=torch.int64), meta(TOKENS, dtype=torch.int64))
    for norm in (QkNorm(meta(dim), meta(dim), 1e-6), None):
        title = f"{name}{' norm' if norm else ''}"
        yield from recorded(target, title, partial(rope_norm_write, qkv, Rotation(angles, angles), norm, cache, targets))


def small_launches(target: Chip) -> Iterator[Launch]:
    place, hidden = meta(SEQUENCES, dtype=torch.int32), meta(TOKENS, WIDTH)
    spans = Spans(place, place, place, place, meta(SEQUENCES, 1024, dtype=torch.int32))
    for starts in (None, place):
        yield from recorded(target, "" if starts is None else "after shared", partial(cut, spans, 16, KV_HEADS, None, starts))
    for update in (hidden, None):
        yield from recorded(target, "" if update is None else "update", partial(add_rms_norm, hidden, update, meta(WIDTH), 1e-5))
    yield from recorded(target, "", partial(silu_mul, meta(TOKENS, 7 * WIDTH)))
    real, whole = meta(SEQUENCES, dtype=torch.float32), meta(SEQUENCES, dtype=torch.int64)
    rows, masks = DrawRows(real, place, real, real, whole, place, place), meta(SEQUENCES, VOCAB // 32, dtype=torch.int32)
    logits = meta(SEQUENCES, VOCAB, dtype=torch.float32)
    for mask, adjusted in itertools.product((masks, None), (logits, None)):
        title = f"{'' if mask is None else 'masks'} {'' if adjusted is None else 'adjusted'}"
        yield from recorded(target, title, partial(draw, logits, rows, mask, adjusted, MULTIPROCESSORS))


def step_launches(target: Chip) -> Iterator[Launch]:
    """What surrounds the model in a step."""
    words, newest = meta(num_words(SEQUENCES, TOKENS), dtype=torch.int64), meta(SEQUENCES, dtype=torch.int64)
    tables, tokens = meta(SEQUENCES, 1024, dtype=torch.int32), meta(4096, BLOCK_SIZE, dtype=torch.int32)
    rows = meta(TOKENS, dtype=torch.int64)
    for known, title in ((newest, "own tokens"), (None, "given tokens")):
        held = None if known is None else tokens
        make = partial(prepare, words, known, tables, held, SEQUENCES, TOKENS, BLOCK_SIZE)
        yield from recorded(target, title, make)
    yield from recorded(target, "", lambda: settle(words, rows, rows, newest, SEQUENCES))
    lanes = LaneParameters.of(SEQUENCES, torch.device("meta"))
    yield from recorded(target, "", lambda: draw_rows(lanes, meta(TOKENS, dtype=torch.int32), rows))
    whole, real = meta(SEQUENCES, dtype=torch.int32), meta(SEQUENCES, dtype=torch.float32)
    edits = (meta(SEQUENCES + 1, dtype=torch.int32), whole, real)
    asked = Adjustments(meta(SEQUENCES, dtype=torch.int64), whole, whole, real, real, real, *edits)
    yield from recorded(target, "", lambda: adjust(meta(TOKENS, VOCAB, dtype=torch.float32), rows, asked, tables, tokens))


def linear_launches(target: Chip) -> Iterator[Launch]:
    """Of few rows, and of one more than that."""
    fp8, words = meta(WIDTH, WIDTH, dtype=torch.float8_e4m3fn), meta(WIDTH, WIDTH // 8, dtype=torch.int32)
    row, groups = meta(WIDTH, 1, dtype=torch.float32), meta(WIDTH, WIDTH // 128)
    matrices: dict[str, Matrix] = {
        "int8": Int8Matrix(meta(WIDTH, WIDTH, dtype=torch.int8), row[:, 0]),
        "int8 zeros": GroupedMatrix(meta(WIDTH, WIDTH, dtype=torch.int8), groups, groups, 128),
        "e4m3": GroupedMatrix(fp8, row, None, WIDTH),
        "e4m3 blocks": GroupedMatrix(fp8, groups, None, 128),
        "int4": GroupedMatrix(words, groups.half(), None, 128),
        "int4 zeros": GroupedMatrix(words, groups.half(), groups, 128),
    }
    for (name, matrix), rows in itertools.product(matrices.items(), (16, 32, 33)):
        title = f"{name} rows {rows}"
        yield from recorded(target, title, partial(linear, meta(rows, WIDTH), matrix, meta(WIDTH)), ("_linear",))


def handoff_launches(target: Chip) -> Iterator[Launch]:
    for dim, source, into in itertools.product(DIMS, POOLS, POOLS):
        pool = KvPool(KvLayout(source, LAYERS, KV_HEADS, dim, BLOCK_SIZE), 8, torch.device("meta"))
        payload = meta(4 * replace(pool.layout, dtype=into).block_bytes, dtype=torch.uint8)
        title = f"{source} to {into} D{dim}"
        yield from recorded(target, title, partial(pack, pool, range(4), 100, into, payload))
        if source == into:
            yield from recorded(target, f"unpack {source} D{dim}", partial(unpack, pool, range(4), payload))
