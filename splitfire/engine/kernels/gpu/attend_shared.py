"""`attend_shared`: a prefix that many sequences of a step have in common is read once for all of them (Hydragen, Juravsky et al. 2024).

Groups of such sequences are spans of their own, whose rows are those of all members: tall tiles instead of many that read the same KV.
What the rows know afterwards is what `attend_decode` begins with, whose cut then starts behind the prefix:

    attend_shared(q, cache, shared, scale)
    attend_decode(q, cache, spans, rest, shape, partials, scale, None, out, shared.states)

Nothing here depends on the host either: a CUDA graph may hold both, and steps without groups write lengths of zero. Layers with a window
do without it. Which sequences are a group: shared_prefixes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from splitfire.engine.kernels.gpu.arguments import AttentionLaunch
from splitfire.engine.kernels.gpu.attend_decode import DecodeShape, Partials, launch_decode
from splitfire.engine.kernels.gpu.row_states import RowStates
from splitfire.engine.kernels.gpu.spans import Cut, Places, Spans
from splitfire.engine.pool import LayerCache


@dataclass(frozen=True, slots=True)
class Shared:
    """The groups of a step, and where what is learned of their prefixes is kept."""

    groups: Spans  # with members; the context of a group is what all its members share, multiples of UNIT and of a block
    cut: Cut  # of these groups, with `shape`'s tiles and without a window
    shape: DecodeShape  # decode_shape(group, all rows of a group, ...)
    partials: Partials  # overwritten; may be those of `attend_decode` if they are as large
    states: RowStates  # of all rows of the step, overwritten where they are of members


def attend_shared(
    q: Tensor,  # [num_tokens, num_heads, head_dim], a token's heads one after the other
    cache: LayerCache,
    shared: Shared,
    scale: float,
) -> None:
    """Attention of every member's rows to what its group shares, left in `shared.states`."""
    assert shared.groups.members is not None
    places = Places.of(shared.groups, shared.cut, shared.cut.unit_ends)
    launch_decode(AttentionLaunch.of(q, cache, places, scale, None, q), cache, shared.shape, shared.partials, shared.states)
