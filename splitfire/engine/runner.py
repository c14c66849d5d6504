"""Turns a scheduled step into tensors, runs the model, samples and verifies drafts. Engine thread only.

This is the seam between bookkeeping (blocks, scheduler) and arithmetic (models, kernels): a backend that prepares its
inputs on the device replaces this file and nothing above it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.engine.kernels.attention import QuerySpan, plan_attention
from splitfire.engine.kernels.rope import CacheTargets
from splitfire.engine.kernels.sample import SampledToken, SampleRow, sample
from splitfire.engine.models.transformer import StepInput, Transformer
from splitfire.engine.pool import KvPool
from splitfire.engine.scheduler import Slice


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one sampled slice came to: its tokens, all but the last equal to the drafts, or why there is none."""

    tokens: tuple[SampledToken, ...]
    error: str = ""


class Runner:
    """Owns the model and the pool's bytes."""

    def __init__(self, model: Transformer, pool: KvPool) -> None:
        self.model = model
        self.pool = pool

    def run(self, slices: Seq[Slice]) -> dict[int, Drawn]:
        """Computes every slice's KV; the result has an entry for each index of `slices` that reaches its sequence's end."""
        with torch.inference_mode():
            hidden = self.model.forward(self._inputs(slices), self.pool)
            ends = list(itertools.accumulate(s.num_rows for s in slices))
            sampled = [i for i, s in enumerate(slices) if s.samples]
            if not sampled:
                return {}
            rows = [row for i in sampled for row in range(ends[i] - 1 - len(slices[i].drafts), ends[i])]
            logits = self.model.logits(hidden[rows])
            return dict(zip(sampled, draw(logits, [slices[i] for i in sampled]), strict=True))

    def _inputs(self, slices: Seq[Slice]) -> StepInput:
        device, size = self.pool.device, self.pool.layout.block_size
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        spans: list[QuerySpan] = []
        for piece in slices:
            sequence = piece.sequence
            begin = len(tokens)
            end = piece.begin + piece.num_rows
            tokens += (*sequence.tokens[piece.begin : piece.end], *piece.drafts)
            positions += range(piece.begin, end)
            blocks += (sequence.block_ids[p // size] for p in range(piece.begin, end))
            spans.append(QuerySpan(begin, len(tokens), end, tuple(sequence.block_ids[: -(-end // size)])))
        at = torch.tensor(positions, device=device)
        targets = CacheTargets(torch.tensor(blocks, device=device), at % size)
        return StepInput(torch.tensor(tokens, device=device), at, targets, plan_attention(spans, device))


def draw(logits: Tensor, pieces: Seq[Slice]) -> list[Drawn]:
    """logits [rows, vocab] fp32: of each piece one row after its last token and one after each of its drafts.

    A draft is accepted when it equals the token drawn before it, so a row counts only if all drafts up to it were. One exception
    boundary a piece: what cannot be sampled fails alone."""
    finite = torch.isfinite(logits).all(-1).tolist()
    begins = list(itertools.accumulate((1 + len(p.drafts) for p in pieces), initial=0))
    drawn = [Drawn((), "nonfinite_logits")] * len(pieces)
    first = [i for i, begin in enumerate(begins[:-1]) if finite[begin]]
    tokens = _draw_each(logits[[begins[i] for i in first]], [_row(pieces[i], 0) for i in first])
    for i, token in zip(first, tokens, strict=True):
        if token is None:
            drawn[i] = Drawn((), "sampling_failed")
        else:
            rows = slice(begins[i] + 1, begins[i + 1])
            drawn[i] = Drawn(_verify(logits[rows], finite[rows], pieces[i], token))
    return drawn


def _draw_each(logits: Tensor, rows: Seq[SampleRow]) -> list[SampledToken | None]:
    """None for a row that raises; the others get the same tokens whether one did or not."""
    try:
        return [*sample(logits, rows)]
    except Exception:
        return [_draw_one(logits[i : i + 1], row) for i, row in enumerate(rows)]


def _draw_one(logits: Tensor, row: SampleRow) -> SampledToken | None:
    try:
        return sample(logits, [row])[0]
    except Exception:
        return None


def _verify(logits: Tensor, finite: list[bool], piece: Slice, token: SampledToken) -> tuple[SampledToken, ...]:
    """`token` and what follows it for as long as drafts are right. A row that cannot be sampled ends that as a wrong draft would:
    it is computed again as the next step's first row, and fails the sequence there, after the tokens before it."""
    tokens = [token]
    for i, draft in enumerate(piece.drafts):
        if tokens[-1].token_id != draft or draft in piece.sequence.spec.stopping.stop_token_ids or not finite[i]:
            break
        following = _draw_one(logits[i : i + 1], _row(piece, i + 1))
        if following is None:
            break
        tokens.append(following)
    return tuple(tokens)


def _row(piece: Slice, num_drafts: int) -> SampleRow:
    """The draw after the piece's first `num_drafts` drafts, as if they were tokens already."""
    sequence = piece.sequence
    spec = sequence.spec
    return SampleRow(
        sampling=spec.sampling,
        choice=spec.choice,
        position=sequence.num_tokens + num_drafts,
        prompt_ids=spec.prompt,
        output_ids=[*sequence.tokens[len(spec.prompt) :], *piece.drafts[:num_drafts]] if spec.sampling.has_penalties else (),
        blocked_ids=spec.stopping.stop_token_ids if sequence.num_output + num_drafts < spec.stopping.min_tokens else frozenset(),
    )
