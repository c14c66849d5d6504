"""`sample`: the next token of each sequence, as a function of its logits, its parameters and a position.

The token is `argmax(filtered logits / T + Gumbel(seed, choice, position, token id))`. The noise comes from a counter, so
batching, splitting, preemption, resume and speculation cannot change which token is drawn. Order of the filters:
penalties, logit bias, blocked stop tokens and what a grammar forbids, temperature, top-k, top-p, min-p. Log-probabilities
are those of the model itself, before all of that.

Noise is computed only where it can matter: the Gumbel value of a 32-bit uniform lies within [GUMBEL_MIN, GUMBEL_MAX], so
a token further than that below the best one's score cannot win whatever it draws (lossless, no approximation).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfire.core.sampling import SamplingParams

GUMBEL_MAX = -math.log(-math.log1p(-(2.0**-33)))  # of u = (2^32 - 0.5) / 2^32: 22.87
GUMBEL_MIN = -math.log(33 * math.log(2))  # of u = 2^-33: -3.13
BITS = [*(1 << bit for bit in range(31)), -(1 << 31)]  # of an int32, lowest first
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1

Draw = Callable[[Tensor, SamplingParams, int], int]  # draw_row, and other bodies of it


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sequence's side of the draw. `position` is the new token's place in the sequence, prompt included."""

    sampling: SamplingParams
    choice: int
    position: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    blocked_ids: frozenset[int]  # may not be drawn here: stop tokens before min_tokens
    mask: Tensor | None = None  # [ceil(vocab / 32)] int32: bit t % 32 of word t // 32 says whether token t may be drawn


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The drawn token, and the most likely ones beside it when asked for."""

    token_id: int
    logprob: float | None  # when asked for
    top: tuple[ScoredToken, ...]


def draw_row(logits: Tensor, params: SamplingParams, key: int) -> int:
    """logits [vocab] fp32, some of them finite and none NaN -> the token that `params`, which are not greedy, and `noise_key` make of them."""
    return _draw(_filter(logits / params.temperature, params), key)


def sample(
    logits: Tensor,  # [len(rows), vocab] fp32, finite
    rows: Sequence[SampleRow],
    draw: Draw = draw_row,  # or another body of it
) -> list[SampledToken]:
    """One token for each row; rows never influence one another."""
    return [_sample_row(logits[i], row, draw) for i, row in enumerate(rows)]


def _sample_row(logits: Tensor, row: SampleRow, draw: Draw) -> SampledToken:
    params = row.sampling
    is_plain = not (params.has_penalties or params.logit_bias or row.blocked_ids or row.mask is not None)
    adjusted = logits if is_plain else _adjust(logits, row)
    if params.is_greedy:
        token = int(adjusted.argmax())
    else:
        token = draw(adjusted, params, noise_key(params.seed, row.choice, row.position))
    if params.logprobs is None:
        return SampledToken(token, None, ())
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(params.logprobs) if params.logprobs else None
    scored = () if top is None else tuple(ScoredToken(t, p) for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return SampledToken(token, float(logprobs[token]), scored)


def _adjust(logits: Tensor, row: SampleRow) -> Tensor:
    """Penalties (repetition: Keskar et al. 2019; presence and frequency: OpenAI's API), bias, blocked and forbidden tokens."""
    params = row.sampling
    adjusted = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=logits.device)
        values = adjusted[seen]
        adjusted[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output_ids)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        adjusted[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids = torch.tensor([b.token_id for b in params.logit_bias], device=logits.device)
        adjusted[ids] += torch.tensor([b.bias for b in params.logit_bias], device=logits.device, dtype=logits.dtype)
    if row.blocked_ids:
        adjusted[torch.tensor(sorted(row.blocked_ids), device=logits.device)] = float("-inf")
    if row.mask is not None:
        bits = torch.tensor(BITS, device=logits.device, dtype=torch.int32)
        forbidden = (row.mask[:, None].to(logits.device) & bits == 0).flatten()
        adjusted.masked_fill_(forbidden[: adjusted.numel()], float("-inf"))
    return adjusted


def _filter(scores: Tensor, params: SamplingParams) -> Tensor:
    """Top-k, top-p, min-p: what does not survive becomes -inf. The most likely token always survives."""
    if 0 < params.top_k < scores.numel():
        kth = scores.topk(params.top_k).values[-1]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if params.top_p < 1.0:
        ranked, order = scores.sort(descending=True, stable=True)
        probabilities = ranked.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        scores = scores.masked_fill(
            torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order, before >= params.top_p), float("-inf")
        )
    if params.min_p > 0.0:
        scores = scores.masked_fill(scores < scores.max() + math.log(params.min_p), float("-inf"))
    return scores


def _draw(scores: Tensor, key: int) -> int:
    """argmax(scores + noise), the noise computed only for tokens that can still win."""
    best = scores.argmax()
    floor = scores[best] + gumbel(key, best[None])[0] - GUMBEL_MAX
    candidates = (scores >= floor).nonzero().squeeze(1)
    return int(candidates[(scores[candidates].double() + gumbel(key, candidates)).argmax()])


def noise_key(seed: int, choice: int, position: int) -> int:
    """64 bits that are different for every (seed, choice, position)."""
    return _mix(lane_key(seed, choice) + position * _GOLDEN)


def lane_key(seed: int, choice: int) -> int:
    """What of it does not depend on the position."""
    return _mix(_mix(seed + _GOLDEN) ^ choice)


def gumbel(key: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise of each token id, fp64: SplitMix64 (Steele, Lea, Flood 2014) of key and id, its high 32 bits
    as a uniform number in (0, 1)."""
    x = (token_ids + 1) * _signed(_GOLDEN) + _signed(key)
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    uniform = (_shift(x ^ _shift(x, 31), 32).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def _mix(x: int) -> int:
    x &= _MASK
    x = (x ^ (x >> 30)) * _MIX_1 & _MASK
    x = (x ^ (x >> 27)) * _MIX_2 & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 with the same bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
