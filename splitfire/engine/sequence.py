"""A sequence: the tokens of one choice of one request, and how far they are computed. Owned by the engine thread.

`num_tokens` is what there is, `num_computed` what has KV; a step computes a slice of the gap. A prompt chunk, a decode
step and a verification are the same thing with other numbers. Drafts are never among `tokens`: a step carries them along, and
only those that turn out to be what the sampler draws become tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import NewType

from splitfire.core.hashing import BlockHash, hash_block
from splitfire.core.lifecycle import SEQUENCE, Seq, SeqEvent, advance
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.engine.blocks import BlockId
from splitfire.engine.constraint import Constraint, Grammar
from splitfire.engine.spent import SequenceTimes

SeqId = NewType("SeqId", int)


class Purpose(Enum):
    """PREFILL stops after the first token and holds its blocks for a hand-off; GENERATE goes on to the end."""

    PREFILL = "prefill"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True)
class Fork:
    """One of several choices that share a prompt."""

    seq_id: SeqId
    choice: int


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What an engine is asked for. `output` are tokens another attempt already produced. With `forks`, it is several choices as far
    as their prompt goes: `choice` says nothing then, and with the first token of each the sequence becomes these."""

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
    predicted: tuple[int, ...] = ()  # what the output will resemble, if the client knows
    grammar: Grammar | None = None  # what the output must match
    forks: tuple[Fork, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def choices(self) -> tuple[Fork, ...]:
        """One or several."""
        return self.forks or (Fork(self.seq_id, self.choice),)

    @property
    def ends_at(self) -> int:
        """Tokens it has when it ends here; the last one gets no KV."""
        if self.purpose is Purpose.PREFILL:
            return self.num_tokens + 1
        return len(self.prompt) + self.stopping.max_tokens

    def alone(self, fork: Fork) -> SequenceSpec:
        """One of its choices for itself."""
        return replace(self, seq_id=fork.seq_id, choice=fork.choice, forks=())


class Sequence:
    """Mutable state of one sequence. Invariant: `num_computed <= len(block_ids) * block_size` while RUNNING or HELD. While it has
    a lane (lanes.py), what changes here changes there."""

    def __init__(self, spec: SequenceSpec, arrival: int, block_size: int) -> None:
        self.spec = spec
        self.arrival = arrival
        self.turn: int | None = None  # among prompts that are to be computed; kept when it is preempted
        self.block_size = block_size
        self.state = Seq.WAITING
        self.forks = list(spec.forks)  # those still wanted
        self.tokens: list[int] = [*spec.prompt, *spec.output]
        self.lane = -1  # while RUNNING
        self.is_decoding = False  # only the newest token is missing, and it is one that was sampled here or handed over
        self.prefilled = 0  # tokens that have KV, as long as it does not decode
        self.num_cached = 0  # tokens found in the prefix cache at first admission
        self.num_committed_blocks = 0
        self.block_ids: list[BlockId] = []
        self._names: list[BlockHash] = list(spec.block_hashes)
        self.times = SequenceTimes()
        self.constraint: Constraint | None = None  # has followed every token of the output
        if spec.grammar is not None:
            self.constraint = spec.grammar.start(spec.output, spec.stopping.stop_token_ids)

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
    def num_computed(self) -> int:
        """Tokens that have KV."""
        return len(self.tokens) - 1 if self.is_decoding else self.prefilled

    @property
    def num_missing(self) -> int:
        """Tokens that exist but have no KV yet."""
        return len(self.tokens) - self.num_computed

    @property
    def needs_host(self) -> bool:
        """There is more to a token than which it is: a grammar follows it, or its log-probability is told."""
        return self.constraint is not None or self.spec.sampling.logprobs is not None

    @property
    def plain_from(self) -> int | None:
        """Tokens from which on the next one takes no more than logits and sampling parameters; None when it always takes more."""
        params, stopping = self.spec.sampling, self.spec.stopping
        if self.needs_host or params.has_penalties or params.logit_bias:
            return None
        return len(self.spec.prompt) + (stopping.min_tokens if stopping.stop_token_ids else 0)

    @property
    def greedy_from(self) -> int | None:
        """Tokens from which on the next one is simply the most likely; None when there is more to it than that."""
        return self.plain_from if self.spec.sampling.is_greedy else None

    def fork(self, fork: Fork, token: int, arrival: int) -> Sequence:
        """Another choice of the same prompt, with its own first token. It has no blocks yet."""
        other = Sequence(self.spec.alone(fork), arrival, self.block_size)
        other.tokens = [*self.tokens[: self.num_computed], token]
        other.num_cached = self.num_cached
        other.times = self.times
        other._names = self._names[: self.num_committed_blocks]
        return other

    def become(self, fork: Fork, token: int) -> None:
        """One of its own choices; the others are to be forked off."""
        self.spec = self.spec.alone(fork)
        self.forks = []
        self.tokens.append(token)

    def advance(self, event: SeqEvent) -> None:
        self.state = advance(SEQUENCE, self.state, event)

    def names(self, begin: int, end: int) -> list[BlockHash]:
        """The chained hashes of its logical blocks [begin, end), which must be full of known tokens."""
        names, size = self._names, self.block_size
        for at in range(len(names), end):
            parent = names[-1] if names else self.spec.hash_root
            names.append(hash_block(parent, self.tokens[at * size : (at + 1) * size]))
        return names[begin:end]

    def shareable_names(self) -> list[BlockHash]:
        """Names of the blocks another sequence's cache could supply: all full ones but never the last token's."""
        return self.names(0, (self.num_tokens - 1) // self.block_size)
