"""The compiled step against the torch one, and against itself in other batches, chunks and numbers of threads: bit by bit."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from splitfire.engine.kernels.linear import Int8Matrix, linear, quantise_rows
from splitfire.engine.kernels.native import step as native
from splitfire.engine.models.compiled import CompiledTransformer
from tests.checkpoints import PICO, family_configs, save_checkpoint
from tests.engine.bench import Bench, Piece, prompts_of
from tests.engines import load_compiled, load_model, needs_compiled

pytestmark = needs_compiled
needs_bf16_units = pytest.mark.skipif(not native.has_bf16_units(), reason="no bf16 units")
IS_ROUNDED = pytest.mark.parametrize("rounds", [False, pytest.param(True, marks=needs_bf16_units)], ids=["fp32", "rounded"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, config in family_configs().items():
        save_checkpoint(config, root / name)
    return {name: root / name for name in family_configs()}


# -- matrix products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_product_is_that_of_torch_at_awkward_sizes(dtype: torch.dtype, threads: int) -> None:
    engine = native.StepEngine(threads)
    torch.manual_seed(0)
    for columns, inputs in ((1, 16), (31, 48), (32, 16), (33, 80), (100, 64), (576, 1536)):
        for rows in (1, 2, 11, 12, 13, 25, 119, 120, 121):
            x, weight = torch.randn(rows, inputs), torch.randn(columns, inputs)
            bias = torch.randn(columns)
            matrix: Tensor | Int8Matrix = quantise_rows(weight) if dtype == torch.int8 else weight.to(dtype)
            elements, scales = (matrix.elements, matrix.scales) if isinstance(matrix, Int8Matrix) else (matrix, None)
            panels = native.pack_panels(elements)
            twin = native.Matrix(
                panels.data_ptr(), None if scales is None else scales.data_ptr(), bias.data_ptr(), columns, inputs,
                native.WEIGHTS.index(dtype),
            )  # fmt: skip
            got = engine.multiply(twin, x)
            want = linear(x.double(), matrix.double() if isinstance(matrix, Tensor) else matrix, bias.double())
            assert (got - want).abs().max() <= 1e-5 * (want.abs().max() + 1), (columns, inputs, rows)


@needs_bf16_units
@pytest.mark.parametrize("dtype", native.DOTS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_product_of_rounded_numbers_is_that_of_torch(dtype: torch.dtype, threads: int) -> None:
    engine = native.StepEngine(threads)
    torch.manual_seed(0)
    for columns, inputs in ((1, 16), (31, 48), (32, 16), (33, 80), (100, 64), (576, 1536)):
        for rows in (1, 2, 11, 12, 13, 25, 119, 120, 121):
            x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(columns, inputs).mul(40).clamp(-127, 127).to(dtype)
            panels = native.pack_panels(weight)
            got = engine.multiply(native.Matrix(panels.data_ptr(), None, None, columns, inputs, native.DOTS[dtype]), x)
            want = x.double() @ weight.double().T
            assert (got - want).abs().max() <= 1e-5 * (want.abs().max() + 1), (columns, inputs, rows)


@IS_ROUNDED
@pytest.mark.parametrize("dtype", native.DOTS, ids=str)
def test_a_row_of_a_product_knows_nothing_of_the_others(dtype: torch.dtype, rounds: bool) -> None:
    engine = native.StepEngine(2)
    torch.manual_seed(0)
    weight, x = torch.randn(200, 400).mul(40).clamp(-127, 127).to(dtype), torch.randn(150, 400)
    panels = native.pack_panels(weight)
    matrix = native.Matrix(panels.data_ptr(), None, None, 200, 400, native.DOTS[dtype] if rounds else native.WEIGHTS.index(dtype))
    x = x.bfloat16() if rounds else x
    whole = engine.multiply(matrix, x)
    for begin, end in ((0, 1), (3, 5), (0, 7), (7, 20), (0, 13), (5, 29), (20, 45), (20, 150)):
        assert torch.equal(engine.multiply(matrix, x[begin:end].clone()), whole[begin:end])


# -- steps


@pytest.mark.parametrize("name", family_configs())
def test_every_family_computes_what_torch_computes(name: str, checkpoints: dict[str, Path]) -> None:
    prompts = prompts_of(150, 17, 1)
    want = Bench(load_model(checkpoints[name]), "fp32", prompts).whole()
    got = Bench(load_compiled(checkpoints[name]), "fp32", prompts).whole()
    assert (got - want).abs().max() < 1e-4 * want.std()


def first_layer(bench: Bench) -> Tensor:
    """Of blocks that both sides fill."""
    return bench.pool.elements[torch.from_numpy(bench.tables[0, :8].astype(np.int64)), 0].float()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8", "fp8_e4m3"])
def test_every_pool_holds_what_torch_would_have_written(dtype: str) -> None:
    """Up to roundings of numbers that differ in their last bit."""
    prompts = prompts_of(130, 70)
    torch_bench, bench = Bench(load_model(PICO), dtype, prompts), Bench(load_compiled(PICO), dtype, prompts)
    want, got = torch_bench.whole(), bench.whole()
    exact_bench = Bench(load_model(PICO), "fp32", prompts)
    exact = exact_bench.whole()
    assert (got - exact).norm() < 1.2 * (want - exact).norm()
    if dtype in ("bf16", "fp16"):
        ours, theirs = first_layer(bench), first_layer(torch_bench)
        wide = Bench(load_compiled(PICO), "fp32", prompts)
        wide.whole()
        apart, bits = (first_layer(wide) - first_layer(exact_bench)).abs(), 7 if dtype == "bf16" else 10
        step = 2.0 ** (first_layer(exact_bench).abs().clamp(min=2.0**-14).log2().floor() - bits)
        # What is so far apart rounds to different numbers as often as the middle between two of them lies in between.
        assert (ours != theirs).float().mean() <= 2 * (apart / step).clamp(max=1).mean()


@IS_ROUNDED
@pytest.mark.parametrize(("dtype", "is_int8"), [("bf16", False), ("fp32", True), ("bf16", True)])
def test_weights_of_every_format_are_as_good_as_torch_with_them(dtype: str, is_int8: bool, rounds: bool) -> None:
    rounds = rounds and dtype == "bf16"  # torch computes in fp32 else
    prompts = prompts_of(90, 40)
    wide = "bf16" if dtype == "bf16" else "fp32"
    want = Bench(load_model(PICO, dtype, is_int8=is_int8), wide, prompts).whole()
    got = Bench(load_compiled(PICO, dtype, is_int8=is_int8, rounds=rounds), wide, prompts).whole()
    exact = Bench(load_model(PICO, "fp32", is_int8=is_int8), "fp32", prompts).whole()
    assert (got - exact).norm() <= 1.1 * (want - exact).norm() + 1e-3 * exact.norm()


@needs_bf16_units
@pytest.mark.parametrize("name", family_configs())
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "fp8_e4m3"])
def test_rounded_activations_err_no_more_than_torch_in_bf16(name: str, dtype: str, checkpoints: dict[str, Path]) -> None:
    prompts = prompts_of(150, 17, 1)
    exact = Bench(load_model(checkpoints[name]), "fp32", prompts).whole()
    want = Bench(load_model(checkpoints[name], "bf16"), "bf16" if dtype == "fp32" else dtype, prompts).whole()
    got = Bench(load_compiled(checkpoints[name], "bf16", rounds=True), dtype, prompts).whole()
    assert 0 < (got - exact).norm() < 1.1 * (want - exact).norm()


@IS_ROUNDED
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "fp8_e4m3"])
@settings(max_examples=8, deadline=None)
@given(threads=st.sampled_from([1, 2, 3]), seed=st.integers(0, 1 << 32))
def test_no_batch_chunk_or_thread_changes_a_bit(dtype: str, rounds: bool, threads: int, seed: int) -> None:
    draw = random.Random(seed)
    model = _pico_with(threads, rounds)
    prompts = prompts_of(150, 33, 70)
    alone = Bench(_pico_with(1, rounds), dtype, prompts)
    want = alone.whole()
    offsets = np.cumsum([0, *map(len, prompts)])
    bench = Bench(model, dtype, prompts)
    done = [0] * len(prompts)
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        pieces = []
        for i, prompt in enumerate(prompts):
            size = draw.choice([0, 1, 2, 5, 16, 47, 100])
            if size and done[i] < len(prompt):
                pieces.append(Piece(i, done[i], min(len(prompt), done[i] + size)))
                done[i] = pieces[-1].end
        if pieces:
            logits = bench.step(pieces)
            rows = np.concatenate([np.arange(offsets[p.sequence] + p.begin, offsets[p.sequence] + p.end) for p in pieces])
            assert torch.equal(logits.values, want[rows])
            assert logits.best.tolist() == want[rows].argmax(-1).tolist()
    assert all(torch.equal(bench.kv(i), alone.kv(i)) for i in range(len(prompts)))


@IS_ROUNDED
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_one_token_of_many_heads_is_many_rows(dtype: str, rounds: bool, tmp_path: Path) -> None:
    """40 heads share one of KV: a token's rows fill the lanes, and all of them see all there is, an odd number of tokens too."""
    config = LlamaConfig(
        **{**family_configs()["multi-query"].to_dict(), "hidden_size": 640, "num_attention_heads": 40, "head_dim": 16}
    )
    save_checkpoint(config, tmp_path)
    model = load_compiled(tmp_path, "bf16" if rounds else "fp32", num_threads=1, rounds=rounds)
    prompts = prompts_of(69)
    whole, stepwise = Bench(model, dtype, prompts), Bench(model, dtype, prompts)
    want = whole.whole()
    got = torch.cat([stepwise.step([Piece(0, at, at + 1)]).values for at in range(69)])
    assert torch.equal(got, want)


@IS_ROUNDED
def test_steps_of_one_task_leave_nothing_for_the_next(rounds: bool, tmp_path: Path) -> None:
    """One head of KV, one thread: many rows, few, and many again, with nothing to fetch after them. A worker was seen to fetch for ever."""
    save_checkpoint(family_configs()["multi-query"], tmp_path)
    prompts = prompts_of(300, 1, 10)
    bench, alone = (
        Bench(load_compiled(tmp_path, "bf16" if rounds else "fp32", num_threads=1, rounds=rounds), "bf16", prompts)
        for _ in range(2)
    )
    got: list[Tensor] = []
    steps = threading.Thread(target=lambda: got.append(bench.whole()), daemon=True)  # a step that hangs is deaf to every signal
    steps.start()
    steps.join(30)
    assert not steps.is_alive()
    assert torch.equal(got[0][-10:], alone.step([Piece(2, 0, 10)]).values)


def test_a_long_context_is_shared_by_threads_and_says_the_same() -> None:
    prompts = prompts_of(600)
    one, three = Bench(_pico_with(1), "bf16", prompts), Bench(_pico_with(3), "bf16", prompts)
    for bench in (one, three):
        bench.step([Piece(0, 0, 599)])
    assert torch.equal(one.step([Piece(0, 599, 600)]).values, three.step([Piece(0, 599, 600)]).values)


@IS_ROUNDED
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8"])
def test_a_nan_is_seen_by_whom_it_concerns_and_by_nobody_else(dtype: str, rounds: bool) -> None:
    prompts = prompts_of(64, 40)
    bench = Bench(_pico_with(2, rounds), dtype, prompts)
    want = bench.step([Piece(0, 0, 64), Piece(1, 0, 40)]).values
    block = int(bench.tables[0, 3])  # tokens 48 .. 63 of the first sequence
    if dtype != "int8":
        bench.pool.elements[block, 1, :, :, 9] = torch.nan
    else:
        assert bench.pool.scales is not None
        bench.pool.scales[block, 1, :, :, 9] = torch.nan
    logits = bench.step([Piece(0, 60, 64), Piece(1, 39, 40)])
    assert logits.best[:4].tolist() == [-1] * 4
    assert logits.values[:4].isnan().all()
    assert torch.equal(logits.values[4], want[64 + 39])


@IS_ROUNDED
@pytest.mark.parametrize("num_tokens", [50, 51])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8"])
def test_the_nan_of_a_wrong_draft_does_not_reach_the_rows_before_it(dtype: str, num_tokens: int, rounds: bool) -> None:
    """As a later token of the same step, whose weight is zero for them: its embedding is not a number."""
    prompts = [*prompts_of(num_tokens)]
    bench = Bench(_pico_with(2, rounds), dtype, prompts)
    want = bench.step([Piece(0, 0, num_tokens)]).values
    for rows in (2, 30):  # read as they lie, and turned
        broken = Bench(compiled_with_nan_embedding(prompts[0][-1], rounds), dtype, prompts)
        broken.step([Piece(0, 0, num_tokens - rows)])
        logits = broken.step([Piece(0, num_tokens - rows, num_tokens)])
        assert torch.equal(logits.values[:-1], want[num_tokens - rows : num_tokens - 1])
        assert logits.best[-1] == -1


def compiled_with_nan_embedding(token_id: int, rounds: bool) -> CompiledTransformer:
    """Of an untied twin of pico, so that only what is read is broken."""
    model = load_model(PICO, "bf16" if rounds else "fp32")
    weights = model.weights
    assert isinstance(weights.embed, Tensor)
    embed = weights.embed.clone()
    embed[token_id] = torch.nan
    return CompiledTransformer(
        model.config, type(weights)(embed, weights.layers, weights.final_norm, weights.lm_head), model.rope, 2, rounds=rounds
    )


_PICOS: dict[tuple[int, bool], CompiledTransformer] = {}


def _pico_with(threads: int, rounds: bool = False) -> CompiledTransformer:
    if (threads, rounds) not in _PICOS:
        _PICOS[threads, rounds] = load_compiled(PICO, "bf16" if rounds else "fp32", num_threads=threads, rounds=rounds)
    return _PICOS[threads, rounds]
