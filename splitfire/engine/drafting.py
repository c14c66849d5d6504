"""The seam between the engine and speculation: what is proposed, and what became of it. Pure.

A draft is accepted exactly as far as it equals the tokens the sampler draws, so whoever proposes can make an answer faster
or slower and never different.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from splitfire.engine.sequence import SeqId, Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a sequence's last one."""

    token_ids: tuple[int, ...]
    source: str  # which drafter: "lookup", "predicted" or "model"


@dataclass(frozen=True, slots=True)
class Verified:
    """What one step made of one decoding sequence. `token_ids` are those it got: the accepted drafts and one more."""

    seq_id: SeqId
    draft: Draft | None
    num_accepted: int
    token_ids: tuple[int, ...]


class Speculator(Protocol):
    """Proposes drafts and learns from what becomes of them. Engine thread only, never under the engine's lock."""

    def propose(self, decoding: Seq[Sequence], room: int) -> Mapping[SeqId, Draft]:
        """Drafts for sequences that decode in the next step, `room` tokens in all at most. The engine cuts what does not fit a
        sequence's max_tokens or the pool."""

    def can_skip(self, num_decoding: int) -> bool:
        """Whether `propose` would return nothing for so many sequences, whatever they are. Then `skip` may be called instead."""

    def skip(self, num_decoding: int) -> None:
        """A step that will have no drafts."""

    def verified(self, results: Seq[Verified], num_rows: int, duration_s: float) -> None:
        """After a step of `num_rows` rows, for every sequence that decoded in it."""

    def forget(self, seq_id: SeqId) -> None:
        """The sequence has ended. Unknown ids are ignored."""
