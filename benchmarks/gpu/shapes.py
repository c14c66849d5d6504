"""Models of real shapes with random weights, made where they are used, and pools with sequences in them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.timing import Bench
from splitfire.core.layout import KvLayout
from splitfire.core.model_config import ModelConfig, RopeConfig
from splitfire.engine.kernels.linear import Matrix, quantise_rows
from splitfire.engine.kernels.rope import QkNorm
from splitfire.engine.models.gpu import GpuTransformer
from splitfire.engine.models.rope import rope_table
from splitfire.engine.models.transformer import LayerWeights, Transformer, Weights
from splitfire.engine.pool import KvPool

BLOCK_SIZE = 64


def _config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, dim: int, vocab: int, *, tied: bool, qk: bool
) -> ModelConfig:
    return ModelConfig(
        family="qwen3" if qk else "llama", vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, rms_norm_eps=1e-5, tie_word_embeddings=tied, qkv_bias=False, o_bias=False,
        mlp_bias=False, qk_norm=qk, windows=(None,) * layers, rope=RopeConfig("default", 500000.0), max_positions=131072,
        stored_dtype="bf16", eos_token_ids=(0,), bos_token_id=0,
    )  # fmt: skip


LLAMA_1B = _config(2048, 8192, 16, 32, 8, 64, 128256, tied=True, qk=False)  # Llama-3.2-1B
QWEN_06B = _config(1024, 3072, 28, 16, 8, 128, 151936, tied=True, qk=True)  # Qwen3-0.6B
LLAMA_8B = _config(4096, 14336, 32, 32, 8, 128, 128256, tied=False, qk=False)  # Llama-3.1-8B
TINY = _config(64, 96, 2, 4, 2, 16, 300, tied=True, qk=True)


def shape_of(config: ModelConfig, bench: Bench) -> ModelConfig:
    return TINY if bench.is_dry else config


def random_weights(config: ModelConfig, bench: Bench, *, is_int8: bool = False) -> Weights:
    """Of a size that neither explodes nor fades over the layers."""
    generator = torch.Generator(bench.device).manual_seed(1)

    def tensor(*shape: int, gain: float = 1.0) -> Tensor:
        factor: float = gain * shape[-1] ** -0.5
        return torch.randn(shape, device=bench.device, dtype=bench.dtype, generator=generator) * factor

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Matrix:
        plain = tensor(rows, columns, gain=gain)
        return quantise_rows(plain) if is_int8 else plain

    def ones(width: int) -> Tensor:
        return 0.5 + torch.rand(width, device=bench.device, dtype=bench.dtype, generator=generator)

    q, kv, hidden = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.hidden_size
    layers = tuple(
        LayerWeights(
            ones(hidden), matrix(q + 2 * kv, hidden), None,
            QkNorm(ones(config.head_dim), ones(config.head_dim), config.rms_norm_eps) if config.qk_norm else None,
            matrix(hidden, q), None, ones(hidden), matrix(2 * config.intermediate_size, hidden), None,
            matrix(hidden, config.intermediate_size), None,
        )
        for _ in range(config.num_layers)
    )  # fmt: skip
    embed = matrix(config.vocab_size, hidden, gain=4.0)
    return Weights(
        embed, layers, ones(hidden), embed if config.tie_word_embeddings else matrix(config.vocab_size, hidden, gain=4.0)
    )


def weight_bytes(weights: Weights) -> int:
    """That a step of one row reads: all but the embedding, of which it reads a row."""
    matrices = [weights.lm_head, *(m for layer in weights.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down))]
    held = [m if isinstance(m, Tensor) else m.elements for m in matrices]
    return sum(t.numel() * t.element_size() for t in held)


def body(config: ModelConfig, weights: Weights, bench: Bench) -> GpuTransformer:
    rope = rope_table(config.rope, config.head_dim, 8192, bench.device)
    return GpuTransformer(config, weights, rope, bench.num_multiprocessors)


def torch_body(config: ModelConfig, weights: Weights, bench: Bench) -> Transformer:
    return Transformer(config, weights, rope_table(config.rope, config.head_dim, 8192, bench.device))


def random_pool(config: ModelConfig, bench: Bench, num_tokens: int, dtype: str = "") -> KvPool:
    """Every block holds small random keys and values; dtype: of the pool, of computation when not given."""
    name = dtype or ("fp32" if bench.dtype == torch.float32 else "bf16")
    layout = KvLayout(name, config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE)
    pool = KvPool(layout, layout.blocks_for(num_tokens) + 1, bench.device)
    for block in range(0, pool.num_blocks, 64):
        part = pool.elements[block : block + 64]
        if layout.dtype == "int8":
            part.copy_(torch.randint(-127, 128, part.shape, device=bench.device, dtype=torch.int8))
        else:
            part.copy_(torch.randn(part.shape, device=bench.device).to(part.dtype))
    if pool.scales is not None:
        pool.scales.fill_(1 / 64)
    return pool


def one_layer(config: ModelConfig) -> ModelConfig:
    return replace(config, num_layers=1, windows=(None,))
