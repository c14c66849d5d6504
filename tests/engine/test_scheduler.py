"""The scheduler: chunks beside decodes, whole blocks per chunk, preemption that always leaves progress."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from hypothesis import given, settings
from hypothesis import strategies as st

from splitfire.core.lifecycle import Seq as State
from splitfire.engine.blocks import BlockPool
from splitfire.engine.scheduler import Budget, Scheduler, Slice
from splitfire.engine.sequence import Purpose, Sequence
from tests.engines import make_spec

BLOCK = 8


class Bench:
    """A scheduler whose model is `token = 1`."""

    def __init__(self, num_blocks: int, chunk_tokens: int = 32, max_running: int = 8, saturating_rows: int | None = None) -> None:
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, Budget(chunk_tokens, max_running, saturating_rows), BLOCK)
        self.num_added = 0

    def add(
        self, length: int, max_tokens: int, *, priority: int = 0, token: int = 0, purpose: Purpose = Purpose.GENERATE
    ) -> Sequence:
        spec = make_spec([token + i for i in range(length)], max_tokens, block_size=BLOCK, priority=priority, purpose=purpose)
        sequence = Sequence(spec, self.num_added, BLOCK)
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Slice]:
        slices = self.scheduler.schedule().pieces()
        self.update(slices)
        return slices

    def update(self, slices: Seq[Slice]) -> None:
        """What an engine does after the model."""
        for piece in slices:
            sequence = piece.sequence
            is_sampled = piece.samples
            if is_sampled:
                wrong = [i for i, token in enumerate(piece.drafts) if token != 1]
                num_accepted = wrong[0] if wrong else len(piece.drafts)
                sequence.tokens.extend([1] * (1 + num_accepted))
            self.scheduler.computed(piece)
            if is_sampled and sequence.num_left == 0:
                self.scheduler.finish(sequence)
            elif is_sampled and sequence.spec.purpose is Purpose.PREFILL:
                self.scheduler.hold(sequence)
            elif is_sampled and not sequence.is_decoding:
                self.scheduler.decode(sequence)
        self.pool.check()
        self.scheduler.lanes.check()

    def run(self, sequences: Seq[Sequence], max_steps: int = 5000) -> int:
        for count in range(max_steps):
            if all(s.state is State.FINISHED for s in sequences):
                return count
            self.step()
        raise AssertionError("no progress")


def sizes(slices: Seq[Slice]) -> list[tuple[int, int]]:
    return [(s.begin, s.end) for s in slices]


def test_a_long_prompt_goes_in_chunks_of_whole_blocks() -> None:
    bench = Bench(32, chunk_tokens=20)
    bench.add(50, 1)
    assert [sizes(bench.step()) for _ in range(3)] == [[(0, 16)], [(16, 32)], [(32, 50)]]


def test_more_decoding_sequences_than_a_step_has_tokens_starve_nobody() -> None:
    bench = Bench(64, chunk_tokens=8)
    decoding = [bench.add(8, 30, token=20 * i) for i in range(8)]
    while not all(s.num_output for s in decoding):
        bench.step()
    bench.scheduler.budget = Budget(2, 8)
    for _ in range(5):
        before = [s.num_output for s in decoding]
        bench.step()
        assert [s.num_output - b for s, b in zip(decoding, before, strict=True)] == [1] * 8


def test_decodes_go_first_and_a_chunk_takes_what_is_left() -> None:
    bench = Bench(64, chunk_tokens=20)
    short = bench.add(8, 100)
    bench.step()
    long = bench.add(64, 1, token=100)
    slices = bench.step()
    assert [(s.sequence, s.begin, s.end) for s in slices] == [(short, 8, 9), (long, 0, 16)]


def test_a_prompt_is_joined_only_by_what_costs_it_next_to_nothing() -> None:
    bench = Bench(64, chunk_tokens=64, saturating_rows=16)
    long = bench.add(40, 9)
    first, second, third = (bench.add(6, 9, token=100 * i) for i in (1, 2, 3))
    steps = [[(s.sequence, s.begin, s.end) for s in bench.step()] for _ in range(4)]
    assert steps[0] == [(first, 0, 6), (second, 0, 6)], "a third would make 18 rows, and both wait for it"
    assert steps[1] == [(first, 6, 7), (second, 6, 7), (third, 0, 6)]
    assert steps[2][:3] == [(first, 7, 8), (second, 7, 8), (third, 6, 7)]
    assert steps[2][3:] == [(long, 0, 40)], "nobody has to end in a step that is full"
    assert [end - begin for _, begin, end in steps[3]] == [1, 1, 1, 1]


def test_who_waits_for_a_step_of_its_own_gets_the_next_one() -> None:
    """However many come: each is passed only by those that have less to compute."""
    bench = Bench(64, chunk_tokens=64, saturating_rows=1)
    prompts = [bench.add(length, 1, token=100 * length) for length in (30, 10, 20, 40)]
    computed = [[piece.sequence for piece in bench.step()] for _ in range(4)]
    assert computed == [[prompts[1]], [prompts[2]], [prompts[0]], [prompts[3]]]


def test_higher_classes_go_first_and_older_ones_within_a_class() -> None:
    bench = Bench(64, chunk_tokens=8, max_running=1)
    low, first, second = bench.add(8, 1, priority=1), bench.add(8, 1, priority=2, token=50), bench.add(8, 1, priority=2, token=90)
    order: list[Sequence] = []
    while len(order) < 3:
        order += [s.sequence for s in bench.step()]
    assert order == [first, second, low]


def test_a_prompt_waits_until_all_of_it_has_room() -> None:
    bench = Bench(4)
    bench.add(24, 2)
    waiting = bench.add(24, 2, token=100)
    bench.step()
    assert waiting.state is State.WAITING
    assert waiting.block_ids == []


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench(16, chunk_tokens=64)
    first = bench.add(24, 1)
    bench.run([first])
    bench.add(24, 1)
    assert sizes(bench.step()) == [(16, 24)]  # never the whole prompt: one token at least must be computed to sample from


def test_a_held_prompt_keeps_its_blocks_until_it_is_finished() -> None:
    bench = Bench(4)
    held = bench.add(16, 5, purpose=Purpose.PREFILL)
    bench.step()
    assert held.state is State.HELD
    assert bench.pool.num_available == 2
    assert bench.step() == []
    bench.scheduler.finish(held)
    assert bench.pool.num_available == 4


def test_the_newest_gives_way_and_comes_back_with_its_tokens() -> None:
    bench = Bench(6)
    old, new = bench.add(16, 20), bench.add(16, 20, token=100)
    bench.run([old])
    assert bench.scheduler.num_preemptions >= 1
    tokens = list(new.tokens)
    bench.run([new])
    assert new.tokens[: len(tokens)] == tokens


def test_pool_exhaustion_preempts_the_newest_of_the_lowest_class_and_recovers() -> None:
    """F25: the higher class and the older keep their blocks, admission closes meanwhile, and everybody ends."""
    bench = Bench(12)
    low_old, low_new = bench.add(16, 40), bench.add(16, 40, token=100)
    high = bench.add(16, 40, priority=1, token=200)
    late = None
    while not bench.scheduler.num_preemptions:
        bench.step()
        if late is None and bench.pool.num_available <= 2:
            late = bench.add(8, 2, token=300)
    assert late is not None
    assert bench.scheduler.waiting == [low_new, late]
    assert bench.scheduler.running == [high, low_old]
    bench.run([high, low_old, low_new, late])
    assert all(s.tokens[16:] == [1] * 40 for s in (high, low_old, low_new))


def test_a_prompt_leaves_a_block_for_each_sequence_that_grows() -> None:
    bench = Bench(7)
    growing, full = bench.add(8, 40), bench.add(12, 4, token=100)
    bench.step()
    bench.step()
    assert bench.scheduler.num_growing == 1 and bench.pool.num_available == 3
    prompt = bench.add(16, 10, token=200)
    bench.step()
    assert prompt.state is State.WAITING, "it would take the two blocks that one of them, and itself, need next"
    bench.run([full])
    bench.step()
    assert prompt in bench.scheduler.running
    assert bench.pool.num_available == 3 and bench.scheduler.num_growing == 2
    bench.run([growing, prompt])


def test_what_grows_no_more_needs_nothing_left() -> None:
    bench = Bench(4)
    bench.add(12, 5)
    last = bench.add(14, 3, token=100)
    bench.step()
    assert last in bench.scheduler.running and bench.pool.num_available == 0
    bench.run([last])
    assert bench.scheduler.num_preemptions == 0


def test_a_sequence_that_fills_the_pool_to_its_last_token_runs_alone() -> None:
    bench = Bench(5)
    only = bench.add(16, 25)
    bench.run([only])
    assert bench.scheduler.num_preemptions == 0


def test_two_that_need_the_whole_pool_each_take_turns() -> None:
    """F26: neither ever gives way to the other twice."""
    bench = Bench(10)
    both = [bench.add(16, 65), bench.add(16, 65, token=1000)]
    bench.run(both)
    assert bench.scheduler.num_preemptions == 1
    assert all(s.tokens[16:] == [1] * 65 for s in both)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 80)), min_size=2, max_size=12),
    num_blocks=st.integers(18, 40),
    chunk=st.integers(8, 40),
)
def test_preemptions_are_bounded_by_blocks_of_output(shape: list[tuple[int, int]], num_blocks: int, chunk: int) -> None:
    """Who comes in leaves a block for itself and for each that grows, and who gives way leaves one at least. So between two
    preemptions a block of output is begun, and each is begun once, because tokens are kept: no more preemptions than such blocks."""
    bench = Bench(num_blocks, chunk_tokens=chunk)
    sequences = [bench.add(length, count, token=i * 1000) for i, (length, count) in enumerate(shape)]
    for _ in range(20_000):
        if all(s.state is State.FINISHED for s in sequences):
            break
        before = {id(s) for s in bench.scheduler.running}
        step = bench.scheduler.schedule()
        if any(id(s) not in before for s in bench.scheduler.running):
            assert bench.pool.num_available >= bench.scheduler.num_growing
        bench.update(step.pieces())
    assert all(s.tokens[length:] == [1] * count for s, (length, count) in zip(sequences, shape, strict=True))
    num_output_blocks = sum(-(-(length + count - 1) // BLOCK) - -(-length // BLOCK) for length, count in shape)
    assert bench.scheduler.num_preemptions <= num_output_blocks
    assert bench.pool.num_available == bench.pool.num_blocks


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=8),
    num_blocks=st.integers(9, 20),
    chunk=st.integers(8, 40),
)
def test_no_preemption_livelock(shape: list[tuple[int, int, int]], num_blocks: int, chunk: int) -> None:
    """F26: whatever cannot run together runs one after another, with a bounded number of preemptions."""
    bench = Bench(num_blocks, chunk_tokens=chunk)
    sequences = [
        bench.add(length, count, priority=priority, token=i * 1000)
        for i, (length, count, priority) in enumerate(shape)
        if length + count <= 64
    ]
    bench.run(sequences)
    assert bench.scheduler.num_preemptions <= sum(count for _, count, _ in shape) // BLOCK + len(shape)
    assert bench.pool.num_available == bench.pool.num_blocks
