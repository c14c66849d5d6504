"""A runner that computes as a GPU's does: steps are launched before the tokens of those before them are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from splitfire.engine.batch import batch_of
from splitfire.engine.drawing import StepTokens, draw
from splitfire.engine.kernels.sample import SampleRow, sample
from splitfire.engine.lanes import NOBODY
from splitfire.engine.logits import Logits
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model
from splitfire.engine.scheduler import Step, newest
from splitfire.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Waiting:
    """Its logits are there; nobody has looked at them."""

    logits: Logits
    step: Step
    sample_s: float = 0.0

    def tokens(self) -> StepTokens:
        return draw(self.logits, self.step)


class AheadRunner:
    """Knows the newest token of each lane by itself, and draws every row that takes no more than its parameters."""

    runs_ahead = True

    def __init__(self, model: Model, pool: KvPool) -> None:
        self.model = model
        self.pool = pool
        self.num_ahead = 0  # steps that needed a token which only this runner knew
        self._newest = np.full(4096, NOBODY)

    def launch(self, step: Step) -> Waiting:
        batch = batch_of(step)
        is_pending = batch.token_ids == NOBODY
        self.num_ahead += bool(is_pending.any())
        firsts = np.where(is_pending, self._newest[np.repeat(batch.lanes, np.diff(batch.query_begins))], batch.token_ids)
        with torch.inference_mode():
            logits = self.model.compute(replace(batch, token_ids=firsts), self.pool)
        best, row = logits.best.copy(), 0
        for piece in (*(newest(s) for s in step.lanes.at(step.decoding.lanes)), *step.slices):
            for count in range(1 + len(piece.drafts) if piece.samples else 0):
                if best[row] >= 0:
                    pending = int(step.lanes.num_in_flight[piece.sequence.lane])
                    best[row] = self._drawn(logits, row, piece.sequence, pending + count)
                row += 1
        self._newest[step.decoding.lanes] = best[: len(step.decoding)]
        return Waiting(replace(logits, best=best, is_drawn=np.ones(len(best), np.bool_)), step)

    def run(self, step: Step) -> StepTokens:
        return self.launch(step).tokens()

    def _drawn(self, logits: Logits, row: int, sequence: Sequence, num_more: int) -> int:
        spec = sequence.spec
        position = sequence.num_tokens + num_more
        assert sequence.plain_from is not None and position >= sequence.plain_from, "this runner knows nothing else"
        asked = SampleRow(replace(spec.sampling, logprobs=None), spec.choice, position, (), (), frozenset())
        return sample(logits.values[row : row + 1], [asked], logits.draw)[0].token_id
