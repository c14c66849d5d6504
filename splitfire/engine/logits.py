"""What a model's step comes to: the logits of the rows that were asked for, and what is known of them as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from splitfire.engine.kernels.sample import Draw, draw_row


@dataclass(frozen=True, slots=True)
class Logits:
    """One row for each of the batch's `logit_rows`."""

    values: Tensor  # [num_rows, vocab] fp32
    best: NDArray[np.int64]  # [num_rows] the most likely token, the first of equals; -1 where a logit is not finite
    draw: Draw = draw_row  # the body of it that suits where they are
    is_drawn: NDArray[np.bool_] | None = None  # [num_rows] where `best` is the token that the row's sequence gets; None: nowhere

    @classmethod
    def of(cls, values: Tensor) -> Logits:
        """values [num_rows, vocab] fp32, on any device."""
        # A sum is not finite when one of its terms is not; it reads the logits once and writes nothing.
        is_finite = values.sum(-1).isfinite().numpy(force=True)
        return cls(values, np.where(is_finite, values.argmax(-1).numpy(force=True), -1))
