"""The seam between the engine and grammars: which tokens may follow what a sequence has said. Pure.

A constraint is a function of (grammar, output ids): it is made anew wherever a sequence comes to, and follows its tokens. It never
decides which of the allowed tokens comes, so batches, drafts, hand-offs and resumes change nothing about them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.int32]  # [ceil(vocab / 32)]: bit t % 32 of word t // 32 says whether token t may come


WORD_BITS = 32


class ConstraintFailed(Exception):
    """The sequence cannot go on under its grammar. `reason`: `constraint_dead_end` (no token is allowed), `constraint_too_complex`
    (a limit of limits.py), or `constraint_broken` (its tokens are not what the grammar allows)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Constraint(Protocol):
    """What may follow the output so far. Engine thread only."""

    def num_valid(self, drafts: Seq[int]) -> int:
        """How many of the drafts the grammar allows, one after another."""

    def mask(self) -> Mask:
        """Tokens that may come now, at least one; not to be written to. ConstraintFailed when there is none."""

    def advance(self, token_id: int) -> None:
        """One more token of the output. Whatever is wrong with it is for `mask` to say."""

    @property
    def is_over(self) -> bool:
        """Nothing may follow but the end of the sequence."""


def allowed(constraint: Constraint, blocked_ids: Collection[int]) -> Mask:
    """Its mask without `blocked_ids`. ConstraintFailed when nothing is left."""
    mask = constraint.mask()
    if not blocked_ids:
        return mask
    rest = mask.copy()
    clear(rest, blocked_ids)
    if not rest.any():
        raise ConstraintFailed("constraint_dead_end")
    return rest


def clear(mask: Mask, token_ids: Iterable[int]) -> None:
    """Forbids these."""
    words = mask.view(np.uint32)
    for token_id in token_ids:
        words[token_id // WORD_BITS] &= np.uint32(~(1 << token_id % WORD_BITS) & 0xFFFFFFFF)


class Grammar(Protocol):
    """A grammar ready to be matched."""

    def start(self, output: Seq[int], stop_token_ids: frozenset[int]) -> Constraint:
        """Positioned after `output`. End-of-sequence ids are allowed where the grammar can end, those of `stop_token_ids` only.
        One thread at a time."""
