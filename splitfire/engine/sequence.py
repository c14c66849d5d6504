"""A sequence: the tokens of one choice of one request, and how far they are computed. Owned by the engine thread.

`num_tokens` is what there is, `num_computed` what has KV; a step computes a slice of the gap. A prompt chunk, a decode
step and a verification are the same thing with other numbers. Drafts are never among `tokens`: a step carries them along, and
only those that turn out to be what the sampler draws become tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from splitfire.core.hashing import BlockHash, hash_block
from splitfire.core.lifecycle import SEQUENCE, Seq, SeqEvent, advance
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.blocks import BlockId

SeqId = NewType("SeqId", int)


class Purpose(Enum):
    """PREFILL stops after the first token and holds its blocks for a hand-off; GENERATE goes on to the end."""

    PREFILL = "prefill"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What an engine is asked for. `output` are tokens another attempt already produced."""

    seq_id: SeqId
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    choice: int
    sampling: SamplingParams
    stopping: StopParams
    purpose: Purpose
    hash_root: BlockHash
    block_hashes: tuple[BlockHash, ...] = ()  # of the leading full blocks; the rest is hashed as it fills
    priority: int = 0  # higher goes first

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)


class Sequence:
    """Mutable state of one sequence. Invariant: `num_computed <= len(block_ids) * block_size` while RUNNING or HELD."""

    def __init__(self, spec: SequenceSpec, arrival: int, block_size: int) -> None:
        self.spec = spec
        self.arrival = arrival
        self.block_size = block_size
        self.state = Seq.WAITING
        self.tokens: list[int] = [*spec.prompt, *spec.output]
        self.num_computed = 0
        self.num_cached = 0  # tokens found in the prefix cache at first admission
        self.num_committed_blocks = 0
        self.block_ids: list[BlockId] = []
        self._names: list[BlockHash] = list(spec.block_hashes)
        self.times = SequenceTimes()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def num_left(self) -> int:
        """Tokens it may still get."""
        return self.spec.stopping.max_tokens - self.num_output

    @property
    def num_missing(self) -> int:
        """Tokens that exist but have no KV yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is missing, and it is one that was sampled here or handed over."""
        return self.num_missing == 1 and self.num_output > len(self.spec.output)

    def advance(self, event: SeqEvent) -> None:
        self.state = advance(SEQUENCE, self.state, event)

    def blocks_needed(self, num_tokens: int) -> int:
        """More blocks than it has, for KV of its first `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(self.block_ids))

    def name_of(self, block: int) -> BlockHash:
        """The chained hash of its logical block `block`, which must be full of known tokens."""
        while len(self._names) <= block:
            at = len(self._names)
            parent = self._names[-1] if self._names else self.spec.hash_root
            self._names.append(hash_block(parent, self.tokens[at * self.block_size : (at + 1) * self.block_size]))
        return self._names[block]

    def shareable_names(self) -> list[BlockHash]:
        """Names of the blocks another sequence's cache could supply: all full ones but never the last token's."""
        return [self.name_of(b) for b in range((self.num_tokens - 1) // self.block_size)]


@dataclass(slots=True)
class SequenceTimes:
    """Instants on this process's monotonic clock, seconds; None until they happen."""

    started: float | None = None  # first scheduled
    prompt_done: float | None = None
