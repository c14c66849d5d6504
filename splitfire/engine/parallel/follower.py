"""`python -m splitfire.engine.parallel.follower RANK CHANNEL MEETING_FILE MEMORY`: one rank but the first of a worker.

Started by followers.py, from which it inherits the three descriptors (MEMORY is -1 on GPUs). It decides nothing, and ends when rank 0
does.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import torch

from splitfire.core.errors import ConfigError
from splitfire.core.flags import exit_with
from splitfire.core.model_dir import ModelDir
from splitfire.core.process import end_with_parent
from splitfire.engine.parallel.channel import Channel
from splitfire.engine.parallel.followers import STEP_S
from splitfire.engine.parallel.group import join
from splitfire.engine.parallel.plan import RankPlan
from splitfire.engine.parallel.pools import cuda_handle, map_pool
from splitfire.engine.parallel.steps import decode
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model


def main() -> int:
    end_with_parent()
    rank, descriptor, meeting_file, memory = map(int, sys.argv[1:])
    try:
        follow(rank, Channel(socket.socket(fileno=descriptor)), meeting_file, memory)
    except ConfigError as exc:
        return exit_with(exc)
    return 0


def follow(rank: int, channel: Channel, meeting_file: int, memory: int) -> None:
    """Loads and joins; then steps."""
    text = channel.receive()
    if text is None:
        return
    plan = RankPlan.from_json(text)
    device = plan.device_of(rank)
    torch.set_num_threads(plan.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        pool = KvPool(plan.rank_layout, plan.num_blocks, device)
    else:
        pool = map_pool(memory, plan.rank_layout, plan.num_blocks)
    model = ModelDir(Path(plan.model))
    shard = plan.load(model, rank)
    channel.send(cuda_handle(pool.raw) if device.type == "cuda" else b"")
    if channel.receive() is None:
        return
    group = join(rank, plan.size, device, meeting_file, STEP_S)
    serve(plan.build(shard, model.config, group), pool, channel)


def serve(model: Model, pool: KvPool, channel: Channel) -> None:
    """Computes every step that comes, until none can come any more."""
    with torch.inference_mode():
        while (message := channel.receive()) is not None:
            model.compute(decode(message), pool)


if __name__ == "__main__":
    sys.exit(main())
