"""Which part of a model each rank of a worker holds. Pure numbers.

As in Megatron-LM (Shoeybi et al. 2019): q, k and v are cut by heads, gate and up by the intermediate size, and out and down by their
inputs, so that a layer needs two sums over the ranks. The head is cut by rows of the vocabulary, as evenly as it goes; norms and the
embedding are everywhere. Ranges are half-open.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from splitfire.core.errors import ConfigError
from splitfire.core.layout import KvLayout
from splitfire.core.model_config import ModelConfig


def share(count: int, rank: int, size: int) -> range:
    """Rank `rank`'s of `count` things in order: equal shares, but the last ones get less if `size` does not divide."""
    most = -(-count // size)
    return range(min(rank * most, count), min((rank + 1) * most, count))


def kept_rows(config: ModelConfig, name: str, rank: int, size: int) -> range | None:
    """Of the matrix of this name in a checkpoint; None: all."""
    module = name.rpartition(".")[2]
    if module in ("gate_proj", "up_proj"):
        return share(config.intermediate_size, rank, size)
    if module == "lm_head":
        return share(config.vocab_size, rank, size)
    num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}.get(module)
    return None if num_heads is None else _heads(config, num_heads, rank, size)


def kept_columns(config: ModelConfig, name: str, rank: int, size: int) -> range | None:
    """Of the matrix of this name in a checkpoint; None: all."""
    module = name.rpartition(".")[2]
    if module == "down_proj":
        return share(config.intermediate_size, rank, size)
    return _heads(config, config.num_heads, rank, size) if module == "o_proj" else None


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """What a rank's shard is by itself. The vocabulary stays whole: every rank embeds every token."""
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def shard_layout(layout: KvLayout, size: int) -> KvLayout:
    """A rank's part of a block."""
    return replace(layout, num_kv_heads=layout.num_kv_heads // size)


def require_shards(config: ModelConfig, size: int) -> None:
    """ConfigError when a model cannot be cut into `size` equal shards."""
    counts = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, count in counts.items():
        if count % size:
            raise ConfigError(
                f"tensor_parallel is {size}, which does not divide the model's {name} = {count}; "
                f"use a divisor of {gcd(*counts.values())}"
            )


def _heads(config: ModelConfig, num_heads: int, rank: int, size: int) -> range:
    """The rank's of so many heads, in elements."""
    heads = share(num_heads, rank, size)
    return range(heads.start * config.head_dim, heads.stop * config.head_dim)
