"""Inverse frequencies of the rope types, fixed once for a configured context length.

`dynamic` (NTK) is defined by its users as depending on the length reached so far. A cache cannot follow that: keys
written early would need another rotation later. Here the base is fixed from the configured context length, which is the
original base exactly while that length stays inside the original window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.core.model_config import RopeConfig
from splitfire.engine.kernels.rope import Rotation


@dataclass(frozen=True, slots=True)
class RopeTable:
    """`rotation(positions)` for any positions; cos and sin are scaled by `attention_factor`."""

    inverse_frequencies: Tensor  # [head_dim / 2] fp32
    attention_factor: float

    def rotation(self, positions: Tensor) -> Rotation:
        """positions [num_tokens] -> cos, sin [num_tokens, 1, head_dim / 2]."""
        angles = positions.float()[:, None, None] * self.inverse_frequencies
        return Rotation(angles.cos() * self.attention_factor, angles.sin() * self.attention_factor)


def rope_table(config: RopeConfig, head_dim: int, context_length: int, device: torch.device) -> RopeTable:
    """Computed on the CPU, so that every device gets the same frequencies."""
    table = _rope_table(config, head_dim, context_length)
    return RopeTable(table.inverse_frequencies.to(device), table.attention_factor)


def _rope_table(config: RopeConfig, head_dim: int, context_length: int) -> RopeTable:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / config.theta**exponents
    if config.rope_type == "linear":
        return RopeTable(plain / config.factor, 1.0)
    if config.rope_type == "dynamic":
        length = max(context_length, config.original_positions)
        stretch = config.factor * length / config.original_positions - (config.factor - 1)
        theta = config.theta * stretch ** (head_dim / (head_dim - 2))
        return RopeTable(1.0 / theta**exponents, 1.0)
    if config.rope_type == "llama3":
        return RopeTable(_llama3(plain, config), 1.0)
    if config.rope_type == "yarn":
        return _yarn(plain, config, head_dim)
    return RopeTable(plain, 1.0)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, the band between interpolated."""
    wavelengths = 2 * math.pi / plain
    turns = config.original_positions / wavelengths
    share = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - share) * plain / config.factor + share * plain
    stretched = torch.where(turns < config.low_freq_factor, plain / config.factor, blended)
    return torch.where(turns > config.high_freq_factor, plain, stretched)


def _yarn(plain: Tensor, config: RopeConfig, head_dim: int) -> RopeTable:
    """YaRN (Peng et al. 2023): per dimension between interpolation and extrapolation, attention scaled to match."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return RopeTable(plain / config.factor * interpolated + plain * (1 - interpolated), _yarn_attention_factor(config))


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)
