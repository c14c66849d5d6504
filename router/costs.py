"""What computing a prompt costs a worker, in seconds, learnt from the prompts it computed. Pure.

The time of a prompt is nearly `base + tokens * token + pairs * pair`: tokens that are not cached, and pairs of those with each token
they attend to. Each worker's three numbers are fitted by recursive least squares with forgetting (Ljung, System Identification, 11.2),
beginning with the rate the worker itself measured.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN_TOKEN_S = 1e-4  # until anything is known: all workers alike
FORGETTING = 0.96  # of each further prompt: about twenty-five count
NOISE = 0.1  # of a prompt's time, as much as is usual
FIRST_ERROR = (0.1, 1.0, 0.1)  # how far the first guess of base, tokens and pairs may be off, in times of a thousand tokens' cost
MAX_SURPRISES = 3  # one after another: what was known is not true any more
MAX_SURPRISE = 3.0  # times the prediction: more is somebody else's doing, and counts as so much
TOKENS, PAIRS = 1e3, 1e6  # units that make the three numbers alike in size


@dataclass(frozen=True, slots=True)
class PromptCost:
    """Seconds: `base_s`, for each token that is computed, and for each pair of such a token and one it attends to."""

    base_s: float = 0.0
    token_s: float = UNKNOWN_TOKEN_S
    pair_s: float = 0.0

    def seconds(self, num_tokens: int, num_cached: int = 0) -> float:
        """Of a prompt of `num_tokens`, the first `num_cached` of which are in the cache."""
        num_new = num_tokens - num_cached
        return self.base_s + num_new * (self.token_s + (num_cached + 0.5 * num_new) * self.pair_s)


class PromptCostFit:
    """One worker's PromptCost, corrected by every prompt it computed."""

    def __init__(self) -> None:
        self.cost = PromptCost()
        self.is_known = False  # anything at all
        self.is_measured = False  # from prompts, not from a reported rate
        self.num_measured = 0
        self._num_surprises = 0  # the latest prompts that took MAX_SURPRISE times as long as predicted, or a part of that
        self._theta = [0.0, 0.0, 0.0]  # base, a thousand tokens, a million pairs: seconds
        self._most: list[float] = []  # their variances are never larger
        self._spread: list[list[float]] = []  # their covariance, in units of NOISE
        self._begin(UNKNOWN_TOKEN_S)

    def start_with(self, tokens_per_s: float) -> None:
        """The rate a worker reports; what prompts have told since is better."""
        if tokens_per_s > 0 and not self.is_measured:
            self.is_known = True
            self._begin(1.0 / tokens_per_s)
            self.cost = PromptCost(token_s=1.0 / tokens_per_s)

    def measured(self, num_tokens: int, num_cached: int, seconds: float) -> None:
        """A prompt took so long, from its first chunk to its first token."""
        num_new = num_tokens - num_cached
        if num_new <= 0 or not 0 < seconds < 1e6:
            return
        x = (1.0, num_new / TOKENS, num_new * (num_cached + 0.5 * num_new) / PAIRS)
        predicted = sum(a * b for a, b in zip(self._theta, x, strict=True))
        if self.is_measured:
            is_surprise = not predicted <= MAX_SURPRISE * seconds <= MAX_SURPRISE**2 * predicted
            self._num_surprises = self._num_surprises + 1 if is_surprise else 0
            if self._num_surprises >= MAX_SURPRISES:
                self._begin(seconds / num_new)
                self._num_surprises, predicted = 0, seconds
            seconds = min(seconds, predicted * MAX_SURPRISE + 1e-3)
        self.is_measured = self.is_known = True
        self.num_measured += 1
        x = (x[0] / seconds, x[1] / seconds, x[2] / seconds)  # so that errors are shares of a prompt's time, long or short
        px = [sum(row[j] * x[j] for j in range(3)) for row in self._spread]
        gain = 1.0 / (FORGETTING + sum(a * b for a, b in zip(x, px, strict=True)))
        error = (1.0 - predicted / seconds) * gain
        fitted = [max(0.0, t + k * error) for t, k in zip(self._theta, px, strict=True)]
        now_predicted = seconds * sum(a * b for a, b in zip(fitted, x, strict=True))
        low, high = sorted((predicted, seconds))
        if (
            predicted > 0 and not low <= now_predicted <= high
        ):  # clipping at zero has led it astray: all parts alike, half of the way
            scale = 0.5 + 0.5 * seconds / predicted
            fitted = [t * scale for t in self._theta]
        self._theta = fitted
        told = [[self._spread[i][j] - gain * px[i] * px[j] for j in range(3)] for i in range(3)]
        # Prompts that are all alike tell nothing of the rest: what is not told is not forgotten either.
        keep = FORGETTING if all(told[i][i] <= FORGETTING * self._most[i] for i in range(3)) else 1.0
        self._spread = [[value / keep for value in row] for row in told]
        base, token, pair = self._theta
        self.cost = PromptCost(base, token / TOKENS, pair / PAIRS)

    def _begin(self, token_s: float) -> None:
        thousand_s = token_s * TOKENS
        self._theta = [0.0, thousand_s, 0.0]
        self._most = [(part * thousand_s / NOISE) ** 2 for part in FIRST_ERROR]
        self._spread = [[self._most[i] if i == j else 0.0 for j in range(3)] for i in range(3)]
