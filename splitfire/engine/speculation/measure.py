"""The cost table, measured: the worker's own runner on made-up sequences, before the first request. Engine's thread, or no other.

They all share the pool's first blocks, which are nobody's yet: what is written there means nothing, and takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from splitfire.core.hashing import BlockHash
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.blocks import BlockId
from splitfire.engine.lanes import Lanes
from splitfire.engine.runner import StepRunner
from splitfire.engine.scheduler import Slice, Step
from splitfire.engine.sequence import Purpose, SeqId, Sequence, SequenceSpec
from splitfire.engine.speculation.costs import CostPoint

CONTEXT = 64  # tokens; what longer ones add is learnt while serving
WIDEST = 128  # rows of a step that is measured
# In order of importance: when time is up, what is left is derived.
SHAPES = (
    *((1, rows) for rows in (1, 16, 128, 4, 64, 2, 8, 32)),
    *((16, rows) for rows in (16, 32, 128, 64)),
    *((4, rows) for rows in (4, 16, 64, 8)),
    *((64, rows) for rows in (64, 128)),
)
DRAFT_SHAPES = ((1, 1), (64, 64), (4, 4), (16, 16))


def measure_steps(
    runner: StepRunner, shapes: Iterable[tuple[int, int]], most_s: float, max_sequences: int, clock: Callable[[], float]
) -> tuple[CostPoint, ...]:
    """The least of up to three times of each (sequences, rows), for about `most_s` in all; at least the first two shapes."""
    room = runner.pool.num_blocks * runner.pool.layout.block_size - CONTEXT
    least: dict[tuple[int, int], float] = {}
    took = 0.0
    wanted = [(n, rows) for n, rows in shapes if n <= max_sequences and rows // n - 1 <= room]
    _time_step(runner, 1, 1, clock)  # the first ever costs more
    for turn in range(3):
        for num_sequences, rows in wanted:
            expected = least.get((num_sequences, rows), rows * min((s / r for (_, r), s in least.items()), default=0.0))
            if took + expected > most_s and (turn or len(least) >= 2):
                continue
            seconds = _time_step(runner, num_sequences, rows, clock)
            took += seconds
            least[num_sequences, rows] = min(seconds, least.get((num_sequences, rows), seconds))
    return tuple(CostPoint(num_sequences, rows, seconds) for (num_sequences, rows), seconds in least.items())


def _time_step(runner: StepRunner, num_sequences: int, rows: int, clock: Callable[[], float]) -> float:
    step = make_step(runner, num_sequences, rows // num_sequences - 1)
    began = clock()
    runner.run(step)
    return clock() - began


def make_step(runner: StepRunner, num_sequences: int, num_drafts: int, context: int = CONTEXT) -> Step:
    """Sequences that decode, each with so many drafts, all in the same blocks."""
    layout = runner.pool.layout
    context = min(context, runner.pool.num_blocks * layout.block_size - num_drafts)
    block_ids = [BlockId(i) for i in range(layout.blocks_for(context + num_drafts))]
    prompt = tuple(i % min(7, runner.model.config.vocab_size) for i in range(context - 1))
    greedy, stopping = SamplingParams(temperature=0.0), StopParams(WIDEST + 1)
    lanes = Lanes(num_sequences, layout.block_size)
    slices = []
    for i in range(num_sequences):
        sequence = Sequence(
            SequenceSpec(SeqId(i), prompt, (), 0, greedy, stopping, Purpose.GENERATE, BlockHash(b"")), i, layout.block_size
        )
        sequence.tokens.append(0)
        sequence.block_ids = block_ids
        lanes.take(sequence)
        if num_drafts:
            slices.append(Slice(sequence, context - 1, context, (0,) * num_drafts))
        else:
            lanes.decode(sequence)
    return Step(lanes, lanes.decoding, slices)
