"""Speculators for tests: over pico, with controllers that do as they are told."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest
import torch

from splitfire.core.layout import KvLayout
from splitfire.engine.blocks import BlockPool
from splitfire.engine.engine import Engine
from splitfire.engine.models.transformer import Transformer
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Launched, Runner
from splitfire.engine.scheduler import Step
from splitfire.engine.sequence import SeqId
from splitfire.engine.speculation.controller import Controller, Offer, Pick
from splitfire.engine.speculation.costs import CostPoint, StepCosts
from splitfire.engine.speculation.draft_model import DraftModel
from splitfire.engine.speculation.modelled import Modelled
from splitfire.engine.speculation.speculator import BatchSpeculator, Sources

CHEAP_ROWS = StepCosts(
    [CostPoint(n, n + more, 0.01 + 0.0001 * (n + more)) for n in (1, 4, 16) for more in (0, 8, 64)], [CostPoint(1, 1, 0.0001)]
)


class Always(Controller):
    """Takes so many tokens of whatever is offered, the draft model's first, whatever they cost; without a width, any number."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(CHEAP_ROWS)
        self._width = width
        self._random = random.Random(width)

    @property
    def width(self) -> int:
        return self._random.choice((0, 1, 2, 5, 16, 128)) if self._width is None else self._width

    def is_worthwhile(self, num_sequences: int) -> bool:
        return True

    def least_survival(self, num_sequences: int) -> float:
        return 0.0

    def choose(self, num_sequences: int, offers: Seq[Offer], modelled: Seq[Offer], room: int) -> dict[SeqId, Pick]:
        offered = {offer.seq_id: offer for offer in (*offers, *modelled)}
        widths = {seq_id: min(self.width, len(offer.survival)) for seq_id, offer in offered.items()}
        return {seq_id: Pick(offered[seq_id].source, width) for seq_id, width in widths.items() if width}


def make_draft_model(
    model: Transformer, *, num_blocks: int = 64, block_size: int = 32, context: int = 2048, max_mirrors: int = 16
) -> DraftModel:
    layout = KvLayout("fp32", model.config.num_layers, model.config.num_kv_heads, model.config.head_dim, block_size)
    runner = Runner(model, KvPool(layout, num_blocks, torch.device("cpu")))
    return DraftModel(runner, BlockPool(num_blocks, caches_prefixes=False), context, max_mirrors)


def make_speculator(
    controller: Controller | None = None, *, sources: Sources | None = None, draft_model: DraftModel | None = None
) -> BatchSpeculator:
    controller = controller or Controller(CHEAP_ROWS)
    modelled = Modelled(draft_model, controller) if draft_model is not None else None
    return BatchSpeculator(controller, lambda: 0.0, sources or Sources(), modelled)


def let_time_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take what CHEAP_ROWS says."""
    now = 0.0
    launch = engine.runner.launch

    def timed(step: Step) -> Launched:
        nonlocal now
        num_sequences = len(step.decoding) + len(step.slices)
        num_extra = sum(len(piece.drafts) for piece in step.slices)
        now += CHEAP_ROWS.plain(num_sequences) + CHEAP_ROWS.added(num_sequences)[num_extra]
        return launch(step)

    monkeypatch.setattr(engine.runner, "launch", timed)
    monkeypatch.setattr(engine, "_clock", lambda: now)
