"""Runs a scheduled step: its arrays, the model, and the draw. Engine thread only.

This is the seam between bookkeeping (blocks, scheduler) and arithmetic (models, kernels): a backend that prepares its inputs on
the device replaces this file and nothing above it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from splitfire.core.model_config import ModelConfig
from splitfire.engine.batch import StepBatch, batch_of
from splitfire.engine.drawing import StepTokens, draw
from splitfire.engine.logits import Logits
from splitfire.engine.pool import KvPool
from splitfire.engine.scheduler import Step


class Model(Protocol):
    """models/transformer.py, or a body of it for one kind of machine."""

    @property
    def config(self) -> ModelConfig: ...

    def compute(self, batch: StepBatch, pool: KvPool) -> Logits:
        """Writes the KV of every row into the pool; logits of those that are asked for."""


class Launched(Protocol):
    """A step that was given to the device. `sample_s`, once its tokens are there: of its time, what the draw took; 0 where the device
    did that too."""

    @property
    def sample_s(self) -> float: ...

    def tokens(self) -> StepTokens:
        """Waits for what it comes to; the device is done with the step then. To be called once."""


class StepRunner(Protocol):
    """`Runner`, and what takes its place (device/runner.py)."""

    @property
    def model(self) -> Model: ...

    @property
    def pool(self) -> KvPool: ...

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the tokens of the one before it are known here."""

    def launch(self, step: Step) -> Launched: ...

    def run(self, step: Step) -> StepTokens:
        """`launch`, and wait."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A step whose results are there."""

    result: StepTokens
    sample_s: float = 0.0

    def tokens(self) -> StepTokens:
        return self.result


class Runner:
    """Owns the model and the pool's bytes. Every step is over when it has been launched."""

    runs_ahead = False

    def __init__(self, model: Model, pool: KvPool) -> None:
        self.model = model
        self.pool = pool

    def launch(self, step: Step) -> Ready:
        """Computes the KV of every row, and a token, or several, for each sequence whose end the step reaches."""
        with torch.inference_mode():
            logits = self.model.compute(batch_of(step), self.pool)
            computed = time.monotonic()
            tokens = draw(logits, step)
            sample_s = time.monotonic() - computed
        if self.pool.device.type == "cuda":
            torch.cuda.current_stream(self.pool.device).synchronize()  # a chunk that ends no prompt has nothing to wait for
        return Ready(tokens, sample_s)

    def run(self, step: Step) -> StepTokens:
        return self.launch(step).result
