"""What a KV pool's dtype and int8 weights cost in quality: `python -m benchmarks.quality`. Half a minute on two cores with
AVX-512, twelve where torch computes.

Model: `pico`, prompts of its held-out text. As in a hand-off, prompts are computed with an fp32 pool, packed into the decode
pool's dtype, and continued there; the opponent goes on in fp32. With int8 weights the same model also computes the prompts, since
workers exchange KV only when their weights have one format; its pool is fp32. And, on made-up keys and values of the kind that larger
models have (outlier channels in keys, outlier tokens in values: KIVI, Liu et al. 2024), int8 as pools keep it beside the
plain cast to e4m3 with one scale of 1 for everything.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.report import Row, half_spread, write
from models.train_pico import END, is_held_out, source_files
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.engine.batch import StepBatch
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.kernels.pack import pack, unpack
from splitfire.engine.kernels.quantise import dequantise, hadamard, quantise
from splitfire.engine.models.bodies import build
from splitfire.engine.models.compiled import CompiledTransformer
from splitfire.engine.models.rope import rope_table
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.pool import TORCH_DTYPES, KvPool
from splitfire.engine.tensors import weight_bytes

PICO = Path(__file__).resolve().parent.parent / "models" / "pico"
CPU = torch.device("cpu")
NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS, BLOCK_SIZE = 100, 256, 64, 32
BLOCKS_EACH = -(-(PROMPT_TOKENS + NUM_TOKENS) // BLOCK_SIZE)
NUM_DRAWS = 8  # of made-up keys and values

Model = Transformer | CompiledTransformer


@dataclass(frozen=True, slots=True)
class Continuation:
    """What was generated, or scored, after each prompt."""

    tokens: Tensor  # [num_prompts, NUM_TOKENS] int64
    logprobs: Tensor  # [num_prompts, NUM_TOKENS]


def held_out_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Windows at even distances over all held-out files, each behind the token that begins a text."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for path in filter(is_held_out, source_files()):
        ids += tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
    length = PROMPT_TOKENS - 1
    starts = [i * (len(ids) - length) // (NUM_PROMPTS - 1) for i in range(NUM_PROMPTS)]
    return [[end, *ids[start : start + length]] for start in starts]


def load_pico(dtype: str = "fp32", is_int8: bool = False) -> Model:
    """In the body that workers would run here."""
    model = ModelDir(PICO)
    weights = load_weights(model, LoadOptions(TORCH_DTYPES[dtype], CPU, is_int8=is_int8))
    config = model.config
    return build(config, weights, rope_table(config.rope, config.head_dim, config.max_positions, CPU), dtype, may_compile=True)


BLOCK_TABLES = np.arange(NUM_PROMPTS * BLOCKS_EACH, dtype=np.int32).reshape(NUM_PROMPTS, BLOCKS_EACH)


def forward(model: Model, pool: KvPool, prompts: Sequence[int], tokens: Tensor, begin: int) -> Tensor:
    """tokens [len(prompts), count] at positions begin, ... of these prompts -> logits [len(prompts), vocab] after the last one."""
    num, count = tokens.shape
    begins = np.arange(num + 1) * count
    step = StepBatch(
        tokens.flatten().contiguous().numpy(), np.tile(np.arange(begin, begin + count), num), begins, np.full(num, begin + count),
        np.array(prompts), BLOCK_TABLES, begins[1:] - 1, 0,
    )  # fmt: skip
    with torch.inference_mode():
        return model.compute(step, pool).values


def hand_off(source: KvPool, target: KvPool) -> None:
    """Every prompt's blocks, by way of a payload."""
    num_blocks = -(-PROMPT_TOKENS // BLOCK_SIZE)
    payload = torch.empty(num_blocks * target.layout.block_bytes, dtype=torch.uint8)
    for prompt in range(NUM_PROMPTS):
        ids = range(prompt * BLOCKS_EACH, prompt * BLOCKS_EACH + num_blocks)
        sent = pack(source, ids, PROMPT_TOKENS, target.layout.dtype, payload)
        received = unpack(target, ids, payload)
        assert sent == received


def go_on(model: Model, pool: KvPool, first_logits: Tensor, forced: Tensor | None = None) -> Continuation:
    """Greedy from the logits after each prompt; or, with `forced` [num_prompts, NUM_TOKENS], scores those tokens."""
    tokens, scores, logits = [], [], first_logits
    everyone = range(NUM_PROMPTS)
    for i in range(NUM_TOKENS):
        chosen = logits.argmax(-1) if forced is None else forced[:, i]
        tokens.append(chosen)
        scores.append(logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0])
        if i < NUM_TOKENS - 1:
            logits = forward(model, pool, everyone, chosen[:, None], PROMPT_TOKENS + i)
    return Continuation(torch.stack(tokens, 1), torch.stack(scores, 1))


def prefill(model: Model, kv_dtype: str = "fp32") -> tuple[KvPool, Tensor]:
    """Every prompt, in a pool of its own, and the logits after each."""
    config = model.config
    layout = KvLayout(kv_dtype, config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE)
    prompts = held_out_prompts(Tokenizer.from_file(str(PICO / "tokenizer.json")))
    pool = KvPool(layout, NUM_PROMPTS * BLOCKS_EACH, CPU)
    return pool, torch.cat([forward(model, pool, [i], torch.tensor([ids]), 0) for i, ids in enumerate(prompts)])


def pico_rows() -> list[Row]:
    model = load_pico()
    exact, first = prefill(model)
    layout = exact.layout
    pools = {dtype: KvPool(replace(layout, dtype=dtype), exact.num_blocks, CPU) for dtype in ("bf16", "fp16", "int8", "fp8_e4m3")}
    for pool in pools.values():
        hand_off(exact, pool)
    best = go_on(model, exact, first)
    rows = []
    for dtype, pool in pools.items():
        greedy, scored = go_on(model, pool, first), go_on(model, pool, first, best.tokens)
        case = f"pico, KV {dtype}"
        rows += agreement_rows(case, best, greedy, scored, 1)  # the first token is prefill's own
        rows.append(bytes_row(case, "bytes a token", pool.layout.token_bytes, layout.token_bytes, "fp32"))
    return rows + bf16_rows(best) + int8_weight_rows(best)


def bf16_rows(best: Continuation) -> list[Row]:
    """All of it in bf16, as `--dtype auto` has it: weights, pool, and where the processor multiplies bf16 the activations too."""
    model = load_pico("bf16")
    pool, first = prefill(model, "bf16")
    return agreement_rows("pico, --dtype bf16", best, go_on(model, pool, first), go_on(model, pool, first, best.tokens), 0)


def int8_weight_rows(best: Continuation) -> list[Row]:
    model = load_pico(is_int8=True)
    pool, first = prefill(model)
    greedy, scored = go_on(model, pool, first), go_on(model, pool, first, best.tokens)
    plain, int8 = (weight_bytes(model.config, "bf16", is_int8) for is_int8 in (False, True))
    case = "pico, weights int8"
    return [*agreement_rows(case, best, greedy, scored, 0), bytes_row(case, "bytes of weights", int8, plain, "bf16")]


def agreement_rows(case: str, best: Continuation, greedy: Continuation, scored: Continuation, since: int) -> list[Row]:
    """Of what was generated, and of the scores of the best's tokens from the token `since` on."""
    same = (greedy.tokens == best.tokens).long().cumprod(1)
    drift = (scored.logprobs - best.logprobs).abs()[:, since:]
    until = same.sum(1).double() / NUM_TOKENS
    return [
        _row(case, f"tokens before the first difference, of {NUM_TOKENS}", "share", float(until.mean()), until.tolist()),
        _row(case, "prompts whose tokens are all the same", "share", float(same[:, -1].double().mean()), ()),
        _row(case, "mean |difference in log-probability|", "nats", float(drift.mean()), drift.mean(1).tolist()),
    ]


def bytes_row(case: str, metric: str, ours: float, opponent: float, opponent_name: str) -> Row:
    return Row(case, metric, "B", ours, opponent, opponent_name, opponent / ours, "reported", None, half_spread(()))


def _row(case: str, metric: str, unit: str, ours: float, values: Sequence[float]) -> Row:
    return Row(case, metric, unit, ours, None, "fp32", None, "reported", None, half_spread(values))


# -- made-up keys and values


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[heads, queries, dim], [heads, tokens, dim] twice -> [heads, queries, dim]; not causal."""
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def round_trip(x: Tensor) -> Tensor:
    return dequantise(*quantise(x, torch.int8))


def plain_cast(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def signal_to_noise(exact: Tensor, approximate: Tensor) -> float:
    """dB."""
    return 10 * math.log10(float(exact.square().sum() / (approximate - exact).square().sum()))


def spread_channels(k: Tensor, size: float, varies: bool, generator: torch.Generator) -> Tensor:
    """Three channels of each head 20 to 50 times as large: with a sign of their own and little variation, or all variation."""
    heads, tokens, dim = k.shape
    channels = torch.stack([torch.randperm(dim, generator=generator)[:3] for _ in range(heads)])
    sizes = size * (20 + 30 * torch.rand(heads, 1, 3, generator=generator))
    noise = torch.randn(heads, tokens, 3, generator=generator)
    signs = torch.randint(0, 2, (heads, 1, 3), generator=generator) * 2 - 1
    return (k * size).scatter(2, channels[:, None].expand(-1, tokens, -1), sizes * (noise if varies else signs + 0.1 * noise))


def noise_of(seed: int, keys: str, outlier_tokens: bool) -> tuple[float, float]:
    """Signal to noise in dB of int8 as a cache keeps it, and of the plain cast. 8 heads of 64, 64 queries over 1024 tokens."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(8, count, 64, generator=generator) for count in (64, 1024, 1024))
    size = 16.0 if keys == "beyond 448" else 1.0
    if keys:
        k = spread_channels(k, size, keys == "varying", generator)
    if outlier_tokens:
        v[:, torch.randperm(1024, generator=generator)[:16]] *= 30
    q /= size  # scores stay what they are
    exact = attention(q, k, v)
    return (
        signal_to_noise(exact, attention(hadamard(q), round_trip(hadamard(k)), round_trip(v))),
        signal_to_noise(exact, attention(q, plain_cast(k), plain_cast(v))),
    )


def outlier_rows() -> list[Row]:
    cases = (
        ("no outliers", "", False),
        ("outlier tokens in values", "", True),
        ("outlier tokens in values, constant outlier channels in keys", "constant", True),
        ("outlier tokens in values, varying outlier channels in keys", "varying", True),
        ("outlier tokens in values, constant outlier channels in keys, 320 to 800", "beyond 448", True),
    )
    rows = []
    for name, keys, outlier_tokens in cases:
        pairs = [noise_of(seed, keys, outlier_tokens) for seed in range(NUM_DRAWS)]
        ours, theirs = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        better = ours - theirs
        spread = half_spread([pair[0] for pair in pairs])
        rows.append(
            Row(name, "attention output, signal to noise", "dB", ours, theirs, "cast to e4m3, scale 1", 10 ** (better / 20),
                "int8 10 dB better (ratio 3.16)", better >= 10, spread)
        )  # fmt: skip
    return rows


def main() -> int:
    with torch.inference_mode():
        rows = [*pico_rows(), *outlier_rows()]
    write("quality", rows, "python -m benchmarks.quality")
    return 0


if __name__ == "__main__":
    sys.exit(main())
