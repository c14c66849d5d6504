"""What the device keeps from step to step: of each lane its block table, its newest token and its sampling parameters, and of each place
of the pool which token's KV it holds. The host sends what has changed in lanes that a step uses; the newest tokens it is never sent back.
Engine thread only.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from splitfire.engine.device.copies import send
from splitfire.engine.kernels.gpu.draw_rows import LaneParameters
from splitfire.engine.kernels.sample import lane_key
from splitfire.engine.lanes import NEVER, Ints, Lanes
from splitfire.engine.pool import KvPool
from splitfire.engine.sequence import Sequence

LEAST_CONTEXT = 256  # tokens: what the steps take that are timed at the start (speculation/measure.py)


class DeviceState:
    """Copies of lanes. Invariant: those given to the last `follow` are what the host's are; others may be out of date."""

    def __init__(self, pool: KvPool, num_lanes: int, max_context: int) -> None:
        device, layout = pool.device, pool.layout
        self.device = device
        self.block_size = layout.block_size
        num_blocks = layout.blocks_for(max(max_context, LEAST_CONTEXT)) + 1
        self.tables = torch.zeros(num_lanes, num_blocks, dtype=torch.int32, device=device)
        self.newest = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self.parameters = LaneParameters.of(num_lanes, device)
        self.tokens = torch.zeros(pool.num_blocks, layout.block_size, dtype=torch.int32, device=device)
        self._lanes: Lanes | None = None

    def follow(self, lanes: Lanes, which: Ints) -> bool:
        """Sends what is new of these lanes; whether one of them has another sequence than before."""
        if lanes is not self._lanes:
            lanes.new_from[:] = 0
            self._lanes = lanes
        first, num_blocks = lanes.new_from[which], lanes.room[which] // self.block_size
        stale = (first < num_blocks) | (first == 0)
        if not stale.any():
            return False
        changed, begins, ends = which[stale], first[stale], num_blocks[stale]
        self._send_tables(lanes, changed, begins, ends)
        if (begins == 0).any():
            self._send_parameters(changed[begins == 0], lanes.at(changed[begins == 0]))
        lanes.new_from[changed] = NEVER
        return bool((begins == 0).any())

    def _send_tables(self, lanes: Lanes, which: Ints, begins: Ints, ends: Ints) -> None:
        width = self.tables.shape[1]
        assert ends.max() <= width, (ends, width)
        pieces = [*zip(which.tolist(), begins.tolist(), ends.tolist(), strict=True)]
        places = np.concatenate([np.arange(lane * width + begin, lane * width + max(begin, end)) for lane, begin, end in pieces])
        ids = np.concatenate([lanes.block_tables[lane, begin : max(begin, end)] for lane, begin, end in pieces])
        self.tables.view(-1).index_copy_(0, send(self.device, places), send(self.device, ids))

    def _send_parameters(self, which: Ints, sequences: list[Sequence]) -> None:
        params, at, to = [s.spec.sampling for s in sequences], send(self.device, which), self.parameters
        keys = np.array([lane_key(s.spec.sampling.seed, s.spec.choice) for s in sequences], np.uint64).view(np.int64)
        for target, values in (
            (to.temperatures, np.array([0.0 if p.is_greedy else p.temperature for p in params], np.float32)),
            (to.top_k, np.array([p.top_k for p in params], np.int32)),
            (to.top_p, np.array([p.top_p for p in params], np.float32)),
            (to.min_p, np.array([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], np.float32)),
            (to.keys, keys),
        ):
            target.index_copy_(0, at, send(self.device, values))
        for sequence in sequences:
            if sequence.spec.sampling.has_penalties:
                self._send_tokens(sequence)

    def _send_tokens(self, sequence: Sequence) -> None:
        """Those whose KV came from elsewhere are not known here."""
        ids = np.array(sequence.tokens[: len(sequence.block_ids) * self.block_size], np.int32)
        at = np.arange(len(ids))
        blocks = np.array(sequence.block_ids, np.int64)[at // self.block_size]
        places = send(self.device, blocks * self.block_size + at % self.block_size)
        self.tokens.view(-1).index_copy_(0, places, send(self.device, ids))
