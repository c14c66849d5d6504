"""Turns a scheduled step into tensors, runs the model, and samples. Engine thread only.

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
    """What one sampled slice came to: a token, or why there is none."""

    token: SampledToken | None
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
            ends = list(itertools.accumulate(s.end - s.begin for s in slices))
            sampled = [i for i, s in enumerate(slices) if s.samples]
            if not sampled:
                return {}
            logits = self.model.logits(hidden[[ends[i] - 1 for i in sampled]])
            return dict(zip(sampled, _draw(logits, [_row(slices[i]) for i in sampled]), strict=True))

    def _inputs(self, slices: Seq[Slice]) -> StepInput:
        device, size = self.pool.device, self.pool.layout.block_size
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        spans: list[QuerySpan] = []
        for piece in slices:
            sequence = piece.sequence
            begin = len(tokens)
            tokens += sequence.tokens[piece.begin : piece.end]
            positions += range(piece.begin, piece.end)
            blocks += (sequence.block_ids[p // size] for p in range(piece.begin, piece.end))
            spans.append(QuerySpan(begin, len(tokens), piece.end, tuple(sequence.block_ids[: -(-piece.end // size)])))
        at = torch.tensor(positions, device=device)
        targets = CacheTargets(torch.tensor(blocks, device=device), at % size)
        return StepInput(torch.tensor(tokens, device=device), at, targets, plan_attention(spans, device))


def _row(piece: Slice) -> SampleRow:
    sequence = piece.sequence
    stopping = sequence.spec.stopping
    return SampleRow(
        sampling=sequence.spec.sampling,
        choice=sequence.spec.choice,
        position=sequence.num_tokens,
        prompt_ids=sequence.spec.prompt,
        output_ids=sequence.tokens[len(sequence.spec.prompt) :] if sequence.spec.sampling.has_penalties else (),
        blocked_ids=stopping.stop_token_ids if sequence.num_output < stopping.min_tokens else frozenset(),
    )


def _draw(logits: Tensor, rows: Seq[SampleRow]) -> list[Drawn]:
    """One exception boundary a row: a row that cannot be sampled fails alone."""
    finite = torch.isfinite(logits).all(-1).tolist()
    good = [i for i, ok in enumerate(finite) if ok]
    drawn = [Drawn(None, "nonfinite_logits")] * len(rows)
    try:
        for i, token in zip(good, sample(logits[good] if len(good) < len(rows) else logits, [rows[i] for i in good]), strict=True):
            drawn[i] = Drawn(token)
    except Exception:  # find the row that did it; the others get the same tokens as before
        for i in good:
            try:
                drawn[i] = Drawn(sample(logits[i : i + 1], [rows[i]])[0])
            except Exception:
                drawn[i] = Drawn(None, "sampling_failed")
    return drawn
