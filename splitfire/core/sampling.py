"""What decides which token comes next and when to stop: frozen, complete, valid. Made by `validation.py` alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitfire.core.limits import GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class TokenBias:
    """One entry of `logit_bias`."""

    token_id: int
    bias: float  # added to the logit


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampler's side of a request. With `choice` and the sequence's ids it determines every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[TokenBias, ...] = ()
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class StopParams:
    """When a worker stops by itself. Stop strings are the router's: only it sees text."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)  # end-of-sequence ids among them unless ignored
