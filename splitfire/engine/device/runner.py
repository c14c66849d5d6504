"""Runs scheduled steps on a GPU: inputs made there, tokens drawn there, and the next step launched before this one is over.

Life of a step here:
 1. `launch` sends what is new of its lanes (state.py) and its words (kernels/gpu/prepare.py): all asynchronous.
 2. A step of newest tokens and drafts that fits the ladder replays a recorded shape (graphs.py): inputs, forward, draw, newest tokens.
    Others are launched op by op.
 3. Rows that take penalties, biases or a grammar's mask are drawn again with these, by the same kernels.
 4. One copy of the token ids goes to the host; `tokens` waits for it, and only what a grammar or log-probabilities want is done there.

Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitfire.engine.batch import StepBatch, batch_of
from splitfire.engine.device.copies import Fetching, fetch, send, sent_to
from splitfire.engine.device.graphs import GROUPS, ROWS, Ladder, Recorder
from splitfire.engine.device.special import Special, special_rows
from splitfire.engine.device.state import DeviceState
from splitfire.engine.drawing import StepTokens, draw
from splitfire.engine.kernels.gpu.adjust import Adjustments, adjust
from splitfire.engine.kernels.gpu.attend_decode import decode_shape
from splitfire.engine.kernels.gpu.draw_rows import draw_rows
from splitfire.engine.kernels.gpu.prepare import num_words, prepare, settle, shared_places, words_of
from splitfire.engine.kernels.gpu.sample import DrawRows
from splitfire.engine.kernels.gpu.sample import draw as draw_on_device
from splitfire.engine.kernels.gpu.shared_prefixes import Prefix, shared_prefixes
from splitfire.engine.logits import Logits
from splitfire.engine.models.gpu import GpuTransformer, StepShape
from splitfire.engine.pool import KvPool
from splitfire.engine.scheduler import Step

NO_LANES = np.zeros(0, np.int64)
PARTS = 8  # of a row that is drawn again: one number for all, so that it is compiled once


@dataclass(frozen=True, slots=True)
class Outputs:
    """A step's results on the device; those of a recorded one are overwritten by the next."""

    logits: Tensor  # [num_rows, vocab] fp32; of all rows, or those that are asked for
    positions: Tensor  # [num_rows] int64
    rows: DrawRows
    tokens: Tensor  # [num_rows] int64
    settle: Callable[[], None]  # makes the tokens the newest of their lanes, where every sequence has newest token and drafts


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step."""

    step: Step
    logits: Tensor
    fetching: Fetching  # a token for each row of logits
    is_drawn: NDArray[np.bool_]  # [num_logits]
    sample_s: float = 0.0  # drawn within the recorded step

    def tokens(self) -> StepTokens:
        best = self.fetching.wait()[: len(self.is_drawn)]
        with torch.inference_mode():
            return draw(Logits(self.logits, best, is_drawn=self.is_drawn), self.step)


class DeviceRunner:
    """Owns the model, the pool's bytes and what the device keeps of each lane."""

    runs_ahead = True

    def __init__(self, model: GpuTransformer, pool: KvPool, num_lanes: int, max_context: int) -> None:
        self.model = model
        self.pool = pool
        self.state = DeviceState(pool, num_lanes, max_context)
        config, device = model.config, pool.device
        self._group = config.num_heads // config.num_kv_heads
        low_tile = decode_shape(self._group, 1, model.num_multiprocessors)
        most_rows = ROWS[-1]
        self._ladder: Ladder[Outputs] = Ladder(low_tile.tile_tokens(self._group), shares=None in config.windows)
        self._words = torch.zeros(num_words(most_rows, most_rows, GROUPS), dtype=torch.int64, device=device)
        self._prefixes: list[Prefix] = []  # of the sequences in these lanes, in this order
        self._prefix_lanes = NO_LANES
        self._logits = torch.empty(most_rows, config.vocab_size, device=device)

    def record(self, recorder: Recorder, on_progress: Callable[[int, int], None]) -> None:
        """Records every shape of the ladder, from an empty step that writes nothing. Until then steps are launched op by op."""
        with torch.inference_mode():
            self._words.zero_()
            self._ladder.record(recorder, self._decode, on_progress)

    def compile_others(self) -> None:
        """What is launched op by op: or the first prompt, and the first request with a penalty or a grammar, would wait for a compiler,
        and everybody with them. An empty step, so that nothing is written."""
        device, vocab = self.pool.device, self.model.config.vocab_size
        with torch.inference_mode():
            shape = StepShape(1, 1, 1, 1)
            row = torch.zeros(1, dtype=torch.int64, device=device)
            outputs = self._outputs(torch.zeros(num_words(1, 1), dtype=torch.int64, device=device), shape, row)
            masks = torch.full((1, -(-vocab // 32)), -1, dtype=torch.int32, device=device)
            zero, real = torch.zeros(2, dtype=torch.int32, device=device), torch.ones(1, device=device)
            asked = Adjustments(row, zero[:1], zero[:1], real, real, real, zero, zero[:1], real)
            adjusted = adjust(outputs.logits, outputs.positions, asked, self.state.tables, self.state.tokens)
            for mask, changed in ((masks, None), (None, adjusted), (masks, adjusted)):
                draw_on_device(outputs.logits, outputs.rows, mask, changed, PARTS)

    def run(self, step: Step) -> StepTokens:
        return self.launch(step).tokens()

    def launch(self, step: Step) -> Flight:
        batch = batch_of(step)
        with torch.inference_mode():
            if self.state.follow(step.lanes, batch.lanes):
                self._prefix_lanes = NO_LANES
            is_decoding = len(batch.logit_rows) == len(batch.token_ids)
            outputs = self._replay(batch) if is_decoding else None
            if outputs is None:
                outputs = self._compute(batch, is_decoding=is_decoding)
            special = special_rows(step)
            if special.rows:
                self._draw_again(special, outputs)
            return Flight(step, outputs.logits, fetch(outputs.tokens), special.is_drawn)

    # -- inside

    def _replay(self, batch: StepBatch) -> Outputs | None:
        counts = np.diff(batch.query_begins)
        if not np.array_equal(batch.lanes, self._prefix_lanes):
            tables = batch.block_tables[batch.lanes]
            self._prefixes = shared_prefixes(tables, batch.context_lens - counts, self.state.block_size)
            self._prefix_lanes = batch.lanes
        found = self._ladder.fit(len(batch.token_ids), int(counts.max()), shares=bool(self._prefixes))
        if found is None:
            return None
        shape, recorded = found
        words = words_of(batch, shape.capacity, shape.num_rows, self._prefixes, shape.num_groups)
        sent_to(self._words[: len(words)], words)
        recorded.replay()
        return recorded.result

    def _decode(self, shape: StepShape) -> Outputs:
        """What is recorded: a step of newest tokens and drafts, of which every row is drawn."""
        return self._outputs(self._words[: num_words(shape.capacity, shape.num_rows, shape.num_groups)], shape, None)

    def _compute(self, batch: StepBatch, *, is_decoding: bool) -> Outputs:
        shape = self.model.shape_of(batch, self.pool)
        words = send(self.pool.device, words_of(batch, shape.capacity, shape.num_rows))
        return self._outputs(words, shape, None if is_decoding else send(self.pool.device, batch.logit_rows))

    def _outputs(self, words: Tensor, shape: StepShape, logit_rows: Tensor | None) -> Outputs:
        model, state = self.model, self.state
        prepared = prepare(words, state.newest, state.tables, state.tokens, shape.capacity, shape.num_rows, state.block_size)
        shared = None
        if shape.num_groups:
            shared = shared_places(words, state.tables, shape.capacity, shape.num_rows, shape.num_groups)
        hidden, update = model.forward(prepared, shape, self.pool, shared)
        row_lanes, positions = prepared.row_lanes, prepared.positions
        if logit_rows is not None:
            hidden, update, row_lanes, positions = (x[logit_rows] for x in (hidden, update, row_lanes, positions))
        logits = model.logits(hidden, update)
        is_kept = shape.num_tiles == 0 and len(logits) <= len(self._logits)  # in one piece of memory for all recorded shapes
        logits = self._logits[: len(logits)].copy_(logits) if is_kept else logits.float()
        rows = draw_rows(state.parameters, row_lanes, positions)
        drawn = draw_on_device(logits, rows, None, None, model.num_multiprocessors)

        def settled() -> None:
            if logit_rows is None:
                settle(words, prepared.token_ids, drawn.tokens, state.newest, shape.capacity)

        settled()
        return Outputs(logits, positions, rows, drawn.tokens, settled)

    def _draw_again(self, special: Special, outputs: Outputs) -> None:
        """Rows that take more than sampling parameters."""
        device, state = self.pool.device, self.state
        at = send(device, np.array(special.rows))
        masks = send(device, np.stack(special.masks)) if special.masks else None
        adjusted = None
        if special.adjusted:
            adjusted = adjust(outputs.logits, outputs.positions, special.adjustments(device), state.tables, state.tokens)
        given = outputs.rows
        rows = DrawRows(
            given.temperatures[at], given.top_k[at], given.top_p[at], given.min_p[at], given.keys[at],
            send(device, np.array(special.mask_rows, np.int32)), send(device, np.array(special.adjusted_rows, np.int32)),
        )  # fmt: skip
        drawn = draw_on_device(outputs.logits[at], rows, masks, adjusted, PARTS * len(special.rows))
        outputs.tokens.index_copy_(0, at, drawn.tokens)
        outputs.settle()
