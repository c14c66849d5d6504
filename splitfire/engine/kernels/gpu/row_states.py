"""What rows know of a part of their context, kept from one pass of attention for the next: how prefixes are shared (attend_shared.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.flash import no_units, store_rows


class RowStates(NamedTuple):
    """What rows know after a part of their context: attention that is not divided by its weight yet."""

    mixed: Tensor  # [num_tokens, num_heads, head_dim] fp32
    tops: Tensor  # [num_tokens, num_heads] fp32, largest score
    weights: Tensor  # [num_tokens, num_heads] fp32

    @staticmethod
    def of(num_tokens: int, num_heads: int, head_dim: int, device: torch.device) -> RowStates:
        mixed, rows = (
            torch.empty(num_tokens, num_heads, head_dim, device=device),
            torch.empty(2, num_tokens, num_heads, device=device),
        )
        return RowStates(mixed, rows[0], rows[1])


@triton.jit
def at_head(what, token, head, GROUP: tl.constexpr):
    """Which of all vectors [num_tokens, num_heads] each row has."""
    return token * (what.num_kv_heads * GROUP) + head


@triton.jit
def before_units(
    what, shared, sequence, first, token, head, is_there,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """State of a tile's rows before the item's unit `first`: what is shared, if it is the first and there is something."""
    mixed, top, weight = no_units(ROWS, WIDTH)
    if what.places.starts is not None:
        d = tl.arange(0, WIDTH)
        at = at_head(what, token, head, GROUP)
        tokens = tl.zeros([ROWS], tl.int32) + tl.where(first == 0, tl.load(what.places.starts + sequence), 0)
        knows = is_there & (tokens > 0)
        mixed = tl.load(shared.mixed + at[:, None] * DIM + d[None, :], knows[:, None] & (d < DIM)[None, :], 0.0)
        top = tl.load(shared.tops + at, knows, float("-inf"))
        weight = tl.load(shared.weights + at, knows, 0.0)
    return mixed, top, weight


@triton.jit
def finish(
    what, shared, mixed, top, weight, token, head, is_there,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of an item whose units have all been seen: its rows' results, or for groups what they know now."""
    if what.places.members is None:
        store_rows(what, mixed, weight, token, head, is_there, FORMAT, GROUP, DIM, WIDTH)
    else:
        d = tl.arange(0, WIDTH)
        at = at_head(what, token, head, GROUP)
        tl.store(shared.mixed + at[:, None] * DIM + d[None, :], mixed, is_there[:, None] & (d < DIM)[None, :])
        tl.store(shared.tops + at, top, is_there)
        tl.store(shared.weights + at, weight, is_there)
