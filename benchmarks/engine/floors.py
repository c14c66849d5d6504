"""What a step cannot be faster than: bytes that have to move over bandwidth, or operations over peak, where that is more. Pure.

Bytes are those of the formats asked for: a bf16 checkpoint has two bytes a weight even where the engine chose to keep four.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.engine.machine import Machine
from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.core.model_config import ModelConfig
from splitfire.engine.tensors import expected_matrices


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step, or of one prompt."""

    weight_bytes: int  # read once
    kv_bytes: int  # read
    num_ops: int
    is_int8: bool  # products may be of int8

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def floor_s(self, machine: Machine) -> float:
        return max(self.num_bytes / machine.read_bytes_per_s, self.num_ops / machine.ops_per_s(self.is_int8))

    def words(self, machine: Machine) -> str:
        """What bounds it here."""
        is_memory = self.num_bytes / machine.read_bytes_per_s >= self.num_ops / machine.ops_per_s(self.is_int8)
        return f"floor, {self.num_bytes / 1e6:.0f} MB" if is_memory else f"floor, {self.num_ops / 1e9:.1f} GFLOP"


def weight_bytes(config: ModelConfig, weights: str, dtype: str) -> int:
    """All matrices that a token goes through; of an embedding that is not also the output only a row is read."""
    each = 1 if weights == "int8" else DTYPE_BYTES[config.stored_dtype if dtype == "auto" else dtype]
    return _num_weights(config) * each


def decode(config: ModelConfig, layout: KvLayout, num_weight_bytes: int, streams: int, context: int, is_int8: bool) -> Work:
    """One token for each of `streams` sequences with `context` tokens each."""
    ops = 2 * _num_weights(config) + _attention_ops(config, context)
    return Work(num_weight_bytes, streams * context * layout.token_bytes, streams * ops, is_int8)


def prefill(config: ModelConfig, layout: KvLayout, num_weight_bytes: int, num_tokens: int, is_int8: bool) -> Work:
    """A whole prompt up to its first token: the output matrix meets one row."""
    output = config.vocab_size * config.hidden_size
    pairs = num_tokens * (num_tokens + 1) // 2
    ops = 2 * (_num_weights(config) - output) * num_tokens + 2 * output + _attention_ops(config, pairs)
    return Work(num_weight_bytes, num_tokens * layout.token_bytes, ops, is_int8)


def _num_weights(config: ModelConfig) -> int:
    num_elements = sum(rows * columns for rows, columns in expected_matrices(config).values())
    return num_elements - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def _attention_ops(config: ModelConfig, pairs: int) -> int:
    """Scores and sums of `pairs` of a query and a token it sees, in all heads and layers."""
    return 4 * config.num_heads * config.head_dim * config.num_layers * pairs
