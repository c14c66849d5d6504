"""Rows of a step whose draw takes more than sampling parameters: penalties and biases, stop tokens that may not come yet, a grammar's mask.
Found on the host, which knows the requests; no token has to be known for it but those that grammars follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from splitfire.engine.constraint import ConstraintFailed, allowed
from splitfire.engine.device.copies import send
from splitfire.engine.kernels.gpu.adjust import Adjustments
from splitfire.engine.kernels.gpu.sample import NONE
from splitfire.engine.scheduler import Step
from splitfire.engine.sequence import Sequence


@dataclass(slots=True)
class Special:
    """Which rows of a step's logits are drawn on the device, and how those of them that are special."""

    is_drawn: NDArray[np.bool_]  # [num_logits]; False: by the host, from the logits
    rows: list[int] = field(default_factory=list)  # to be drawn again
    masks: list[NDArray[np.int32]] = field(default_factory=list)
    mask_rows: list[int] = field(default_factory=list)  # of `masks`, of each of `rows`, or NONE
    adjusted: list[Adjusted] = field(default_factory=list)
    adjusted_rows: list[int] = field(default_factory=list)  # of `adjusted`, of each of `rows`, or NONE

    def adjustments(self, device: torch.device) -> Adjustments:
        """On the device; a row for each of `adjusted`."""
        params = [one.sequence.spec.sampling for one in self.adjusted]
        lanes = [one.sequence.lane for one in self.adjusted]
        prompts = [len(one.sequence.spec.prompt) for one in self.adjusted]
        edits = [_edits(one) for one in self.adjusted]
        columns: tuple[NDArray[np.generic], ...] = (
            np.array([one.row for one in self.adjusted], np.int64), np.array(lanes, np.int32), np.array(prompts, np.int32),
            np.array([p.repetition_penalty for p in params], np.float32), np.array([p.presence_penalty for p in params], np.float32),
            np.array([p.frequency_penalty for p in params], np.float32), np.cumsum([0, *(len(e) for e in edits)]).astype(np.int32),
            np.array([token for e in edits for token in e], np.int32), np.array([v for e in edits for v in e.values()], np.float32),
        )  # fmt: skip
        return Adjustments(*(send(device, column) for column in columns))


@dataclass(frozen=True, slots=True)
class Adjusted:
    """A row that penalties, biases or stop tokens change."""

    row: int
    sequence: Sequence
    num_output: int  # before the token to be drawn


def special_rows(step: Step) -> Special:
    """To be asked before the step counts as in flight."""
    columns, lanes = step.lanes, step.decoding.lanes
    num_tokens = columns.num_tokens[lanes] + columns.num_in_flight[lanes]
    is_plain = (columns.plain_from[lanes] <= num_tokens) & ~columns.needs_host[lanes]
    num_slice_rows = sum(1 + len(piece.drafts) for piece in step.slices if piece.samples)
    special = Special(np.concatenate((is_plain, np.ones(num_slice_rows, np.bool_))))
    for i, sequence in zip((~is_plain).nonzero()[0].tolist(), columns.at(lanes[~is_plain]), strict=True):
        _look(special, i, sequence, int(num_tokens[i]), may_mask=True)
    for row, sequence, position, has_drafts in _slice_rows(step):
        if sequence.forks:
            special.is_drawn[row] = False
        elif sequence.plain_from is None or position < sequence.plain_from:
            _look(special, row, sequence, position, may_mask=not has_drafts)
    return special


def _slice_rows(step: Step) -> Iterator[tuple[int, Sequence, int, bool]]:
    """Of each row that is drawn: its number, sequence, the new token's position, and whether the sequence has drafts."""
    row = len(step.decoding)
    for piece in step.slices:
        for count in range(1 + len(piece.drafts) if piece.samples else 0):
            yield row, piece.sequence, piece.end + count, bool(piece.drafts)
            row += 1


def _look(special: Special, row: int, sequence: Sequence, position: int, *, may_mask: bool) -> None:
    """Books what the row takes; what it cannot have here is the host's."""
    spec, constraint = sequence.spec, sequence.constraint
    special.is_drawn[row] = False
    if spec.sampling.logprobs is not None or (constraint is not None and not may_mask):
        return
    one = Adjusted(row, sequence, position - len(spec.prompt))
    mask_row = adjusted_row = NONE
    if constraint is not None:
        try:
            mask = allowed(constraint, frozenset(_blocked(one)))
        except ConstraintFailed:  # the host finds that too, and says why
            return
        mask_row = len(special.masks)
        special.masks.append(mask)
    if spec.sampling.has_penalties or _edits(one):
        adjusted_row = len(special.adjusted)
        special.adjusted.append(one)
    special.rows.append(row)
    special.mask_rows.append(mask_row)
    special.adjusted_rows.append(adjusted_row)
    special.is_drawn[row] = True


def _edits(one: Adjusted) -> dict[int, float]:
    edits = {bias.token_id: bias.bias for bias in one.sequence.spec.sampling.logit_bias}
    return edits | dict.fromkeys(_blocked(one), -np.inf)


def _blocked(one: Adjusted) -> frozenset[int]:
    stopping = one.sequence.spec.stopping
    return stopping.stop_token_ids if one.num_output < stopping.min_tokens else frozenset()
