"""Numbers in range and finite, whoever sent them: the checks a worker makes again after the router. Bounds are `limits.py`'s."""

from __future__ import annotations

import math
from collections.abc import Iterable

from splitfire.core import limits
from splitfire.core.errors import InvalidInput
from splitfire.core.sampling import SamplingParams, StopParams


def check_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidInput(f"{field}[{i}]", f"is {token_id}, outside 0..{vocab_size - 1}")


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Every number in range and finite, whoever sent it."""
    number("sampling.temperature", params.temperature, 0.0, limits.MAX_TEMPERATURE)
    number("sampling.top_p", params.top_p, 0.0, 1.0, open_low=True)
    number("sampling.min_p", params.min_p, 0.0, 1.0)
    number("sampling.repetition_penalty", params.repetition_penalty, 0.0, limits.MAX_REPETITION_PENALTY, open_low=True)
    number("sampling.presence_penalty", params.presence_penalty, -limits.MAX_PENALTY, limits.MAX_PENALTY)
    number("sampling.frequency_penalty", params.frequency_penalty, -limits.MAX_PENALTY, limits.MAX_PENALTY)
    require(0 <= params.top_k <= vocab_size, "sampling.top_k", params.top_k, "-1 and 0 (off), or 1 and more")
    require(0 <= params.seed <= limits.MAX_SEED, "sampling.seed", params.seed, f"0 to {limits.MAX_SEED}")
    require(
        len(params.logit_bias) <= limits.MAX_LOGIT_BIAS,
        "sampling.logit_bias",
        len(params.logit_bias),
        f"{limits.MAX_LOGIT_BIAS} entries",
    )
    for entry in params.logit_bias:
        if not 0 <= entry.token_id < vocab_size:
            raise InvalidInput("sampling.logit_bias", f"has token id {entry.token_id}, outside 0..{vocab_size - 1}")
        number("sampling.logit_bias", entry.bias, -limits.MAX_BIAS, limits.MAX_BIAS)
    if params.logprobs is not None:
        require(
            0 <= params.logprobs <= min(limits.MAX_LOGPROBS, vocab_size),
            "sampling.logprobs",
            params.logprobs,
            f"0 to {limits.MAX_LOGPROBS}",
        )


def check_stopping(stopping: StopParams, vocab_size: int) -> None:
    """A worker's check of what a router resolved."""
    require(1 <= stopping.max_tokens <= limits.MAX_POSITIONS, "stopping.max_tokens", stopping.max_tokens, "1 and more")
    require(
        0 <= stopping.min_tokens <= stopping.max_tokens,
        "stopping.min_tokens",
        stopping.min_tokens,
        f"0 to max_tokens = {stopping.max_tokens}",
    )
    check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, vocab_size)


def require(is_in_range: bool, field: str, value: object, accepted: str) -> None:
    if not is_in_range:
        raise InvalidInput(field, f"is {value}, accepted: {accepted}")


def number(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    in_range = (low < value if open_low else low <= value) and value <= high
    if not math.isfinite(value) or not in_range:
        raise InvalidInput(field, f"is {value}, accepted: {'over ' if open_low else ''}{low:g} to {high:g}")
