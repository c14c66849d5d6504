"""Whether kernels are right on the device in front of us, before anything is timed: fresh random inputs, poisoned outputs, fp32 beside
them, and the engine token by token. AssertionError at the first that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.attention import Layer
from benchmarks.gpu.shapes import LLAMA_1B, QWEN_06B, TINY, random_pool, random_weights, shape_of, torch_body
from benchmarks.gpu.step import runner_of
from benchmarks.gpu.timing import Bench
from benchmarks.report import Row
from splitfire.core.hashing import chain_root
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.blocks import BlockPool
from splitfire.engine.engine import Engine
from splitfire.engine.kernels import linear as reference_linear
from splitfire.engine.kernels import norm as reference_norm
from splitfire.engine.kernels.attention import attend, plan_batch
from splitfire.engine.kernels.gpu.draw_rows import LaneParameters, draw_rows
from splitfire.engine.kernels.gpu.linear import linear
from splitfire.engine.kernels.gpu.norm import add_rms_norm, silu_mul
from splitfire.engine.kernels.gpu.sample import draw
from splitfire.engine.kernels.linear import quantise_rows
from splitfire.engine.kernels.pack import pack, pack_reference
from splitfire.engine.kernels.sample import SampleRow, lane_key, sample
from splitfire.engine.pool import LayerCache
from splitfire.engine.runner import Runner, StepRunner
from splitfire.engine.scheduler import Budget
from splitfire.engine.sequence import Purpose, SeqId, SequenceSpec

MOST_ERROR = 0.005  # of a result's norm, in bf16; far above rounding, far below any mistake
TOKENS = 24


def rows(bench: Bench) -> list[Row]:
    """One for each check, with the relative error against fp32."""
    checks: dict[str, Callable[[Bench], float]] = {
        **{f"decode attention, {name or 'plain'} KV, {new} new tokens": attention(name, new, is_prefill=False)
           for name in ("", "int8", "fp8_e4m3") for new in (1, 5)},
        **{f"prefill attention, {name or 'plain'} KV": attention(name, 140, is_prefill=True) for name in ("", "int8", "fp8_e4m3")},
        "norm, gate": small_ops, "int8 products": products, "draw": sampling, "pack": packing, "engine, token by token": tokens,
    }  # fmt: skip
    found = []
    for name, check in checks.items():
        error = check(bench)
        assert error < MOST_ERROR, f"{name} is wrong: relative error {error:.3g}"
        found.append(Row(f"check: {name}", "relative error", "", error, None, "fp32", None, f"below {MOST_ERROR}", True, 0.0))
    return found


def error_of(got: Tensor, want: Tensor) -> float:
    assert got.isfinite().all(), "poison or NaN is left"
    return float((got.double() - want.double()).norm() / want.double().norm())


def attention(dtype: str, new: int, *, is_prefill: bool) -> Callable[[Bench], float]:
    def check(bench: Bench) -> float:
        contexts = [max(new, c) for c in ((5, 64, 71) if bench.is_dry else (5, 64, 1000, 4097, 129))]
        layer = Layer(bench, contexts, rows=new, dtype=dtype)
        layer.out.fill_(torch.nan)
        (layer.prefill() if is_prefill else layer.decode())()
        blocks = -(-torch.tensor(contexts) // layer.pool.layout.block_size)
        begins = torch.arange(len(contexts) + 1) * new
        plan = plan_batch(
            begins.numpy(), torch.tensor(contexts).numpy(), layer.spans.tables.cpu().numpy(), blocks.numpy(), bench.device
        )
        cache = layer.pool.layer(0)
        wide = cache if cache.scales is not None else LayerCache(cache.elements.float(), None)
        want = attend(layer.q.float(), wide, plan, layer.config.head_dim**-0.5)
        return error_of(layer.out, want)

    return check


def small_ops(bench: Bench) -> float:
    x, update = (torch.randn(33, 1024, device=bench.device, dtype=bench.dtype) for _ in range(2))
    weight = torch.rand(1024, device=bench.device, dtype=bench.dtype)
    want = reference_norm.rms_norm((x + update).float(), weight.float(), 1e-5)
    worst = error_of(add_rms_norm(x.clone(), update, weight, 1e-5), want)
    return max(worst, error_of(silu_mul(x), reference_norm.silu_mul(x.float())))


def products(bench: Bench) -> float:
    worst = 0.0
    inputs, columns = (256, 96) if bench.is_dry else (4096, 6144)
    matrix = quantise_rows(torch.randn(columns, inputs, device=bench.device))
    for num_rows in (1, 7, 32, 33):
        x = torch.randn(num_rows, inputs, device=bench.device, dtype=bench.dtype)
        worst = max(worst, error_of(linear(x, matrix), reference_linear.linear(x.float(), matrix)))
    return worst


def sampling(bench: Bench) -> float:
    """The share of rows whose token is not the reference's: none."""
    vocab, params = 3000 if bench.is_dry else 128256, SamplingParams(temperature=0.9, top_p=0.95, top_k=200, seed=7)
    logits = torch.randn(6, vocab, device=bench.device) * 3
    lanes = LaneParameters.of(6, bench.device)
    for column, value in ((lanes.temperatures, 0.9), (lanes.top_p, 0.95), (lanes.top_k, 200), (lanes.min_p, -torch.inf)):
        column.fill_(value)
    keys = [lane_key(7, choice) for choice in range(6)]
    lanes.keys.copy_(torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys]))
    which, positions = torch.arange(6, dtype=torch.int32, device=bench.device), torch.arange(6, device=bench.device) + 50
    got = draw(logits, draw_rows(lanes, which, positions), None, None, bench.num_multiprocessors).tokens.tolist()
    asked = [SampleRow(params, choice, 51 + choice, (), (), frozenset()) for choice in range(6)]
    want = [token.token_id for token in sample(logits.cpu(), asked)]
    return float(sum(a != b for a, b in zip(got, want, strict=True)) / 6)


def packing(bench: Bench) -> float:
    """The share of bytes and digests that are not the reference's: none."""
    pool = random_pool(replace(TINY if bench.is_dry else shape_of(LLAMA_1B, bench)), bench, 5 * 64)
    worst = 0.0
    for dtype in (pool.layout.dtype, "int8", "fp8_e4m3"):
        size = replace(pool.layout, dtype=dtype).block_bytes
        mine, theirs = (torch.full((3 * size,), 0x7F, dtype=torch.uint8, device=bench.device) for _ in range(2))
        digests = [pack(pool, [4, 0, 2], 150, dtype, mine), pack_reference(pool, [4, 0, 2], 150, dtype, theirs)]
        assert digests[0] == digests[1] or not torch.equal(mine, theirs), "equal bytes with another digest"
        worst = max(worst, float((mine != theirs).float().mean()))
    return worst


def tokens(bench: Bench) -> float:
    """The share of sequences with other tokens than the torch model's, in fp32, where rounding decides nothing."""
    exact = replace(bench, dtype=torch.float32)
    config = shape_of(replace(QWEN_06B, num_layers=4, windows=(None,) * 4), bench)
    weights = random_weights(config, exact)
    context = 40 if bench.is_dry else 300
    torch.backends.cuda.matmul.allow_tf32 = False
    ours: StepRunner = runner_of(config, weights, exact, 4, context, 6 * (context + 128))
    theirs: StepRunner = Runner(torch_body(config, weights, exact), random_pool(config, exact, 6 * (context + 128), "fp32"))
    answers = [list(_answers(runner, config.vocab_size, context, 4 if bench.is_dry else TOKENS)) for runner in (ours, theirs)]
    return float(sum(a != b for a, b in zip(*answers, strict=True)) / len(answers[0]))


def _answers(runner: StepRunner, vocab: int, context: int, num_tokens: int) -> Iterator[list[int]]:
    engine = Engine(runner, BlockPool(runner.pool.num_blocks), Budget(256, 4), lambda: 0.0)
    generator = torch.Generator().manual_seed(3)
    got: dict[int, list[int]] = {}
    for number, params in enumerate((SamplingParams(temperature=0.0), SamplingParams(top_p=0.9, seed=1), SamplingParams(top_k=40))):
        prompt = torch.randint(0, vocab, (context + number,), generator=generator).tolist()
        root = chain_root(b"", b"", "")
        spec = SequenceSpec(SeqId(number), tuple(prompt), (), 0, params, StopParams(num_tokens), Purpose.GENERATE, root)
        engine.add(spec)
        got[number] = []
    while engine.has_work:
        for update in engine.step().updates:
            got[update.seq_id] += [token.token_id for token in update.tokens]
    yield from got.values()
