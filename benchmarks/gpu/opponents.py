"""What our step is held against: a decode loop of plain torch that torch.compile makes fast, and sampling by a sort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.timing import Bench, Run
from splitfire.core.model_config import ModelConfig
from splitfire.engine.models.transformer import Weights


def compiled_step(config: ModelConfig, weights: Weights, bench: Bench, context: int) -> Run:
    """One token of one sequence: static KV cache, SDPA, greedy; in the way of gpt-fast, recorded by torch.compile itself."""
    room = context + 64
    cache = torch.randn(config.num_layers, 2, 1, config.num_kv_heads, room, config.head_dim, device=bench.device, dtype=bench.dtype)
    token = torch.zeros(1, dtype=torch.int64, device=bench.device)
    position = torch.tensor([context], device=bench.device)
    exponents = torch.arange(0, config.head_dim, 2, device=bench.device).float() / config.head_dim
    frequencies = 1.0 / config.rope.theta**exponents
    eps = config.rms_norm_eps

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def step(token: Tensor, position: Tensor) -> Tensor:
        assert isinstance(weights.embed, Tensor) and isinstance(weights.lm_head, Tensor)
        angle = position * frequencies
        cos, sin = angle.cos().to(bench.dtype), angle.sin().to(bench.dtype)
        sees = (torch.arange(room, device=bench.device) <= position)[None, None, None]
        x = functional.embedding(token, weights.embed)
        for index, layer in enumerate(weights.layers):
            normed = functional.rms_norm(x, (config.hidden_size,), layer.input_norm, eps)
            heads = functional.linear(normed, layer.qkv).view(-1, config.head_dim)  # type: ignore[arg-type]
            q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads))
            if layer.qk_norm is not None:
                q = functional.rms_norm(q, (config.head_dim,), layer.qk_norm.q_weight, eps)
                k = functional.rms_norm(k, (config.head_dim,), layer.qk_norm.k_weight, eps)
            keys = cache[index, 0].index_copy_(2, position, rotate(k, cos, sin)[None, :, None])
            values = cache[index, 1].index_copy_(2, position, v[None, :, None])
            mixed = functional.scaled_dot_product_attention(rotate(q, cos, sin)[None, :, None], keys, values, sees, enable_gqa=True)
            x = x + functional.linear(mixed.reshape(1, -1), layer.out)  # type: ignore[arg-type]
            normed = functional.rms_norm(x, (config.hidden_size,), layer.post_norm, eps)
            gate, up = functional.linear(normed, layer.gate_up).chunk(2, -1)  # type: ignore[arg-type]
            x = x + functional.linear(functional.silu(gate) * up, layer.down)  # type: ignore[arg-type]
        return functional.linear(functional.rms_norm(x, (config.hidden_size,), weights.final_norm, eps), weights.lm_head).argmax(-1)

    run = step if bench.is_dry else torch.compile(step, mode="reduce-overhead", fullgraph=True)

    def once() -> Tensor:
        with torch.inference_mode():
            return run(token, position)

    return once


def sorted_draw(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """[rows, vocab] -> [rows]: top-p as most programs do it."""
    ranked, order = (logits / temperature).sort(-1, descending=True)
    probabilities = ranked.softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return order.gather(-1, probabilities.multinomial(1))[:, 0]
