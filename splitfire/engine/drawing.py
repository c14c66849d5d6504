"""From logits to tokens: the next one of each sequence, and which drafts were right. Engine thread only.

A draft is accepted when it equals the token drawn before it, so a row counts only if all drafts up to it were. A sequence's
grammar follows its tokens as they are drawn. One exception boundary a sequence: what cannot be sampled fails alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from splitfire.engine.constraint import ConstraintFailed, allowed
from splitfire.engine.kernels.sample import SampledToken, SampleRow, sample
from splitfire.engine.lanes import Ints
from splitfire.engine.logits import Logits
from splitfire.engine.scheduler import Slice, Step, newest
from splitfire.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one sequence's rows came to: its tokens, all but the last equal to the drafts, or why there is none. Of a sequence that
    is several choices, what each of these came to."""

    tokens: tuple[SampledToken, ...]
    error: str = ""
    is_over: bool = False  # its grammar lets nothing follow
    forks: tuple[Drawn, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step came to. Most sequences that decode get a token and nothing with it."""

    token_ids: Ints  # [len(step.decoding)]; means nothing for those in `others`
    others: Mapping[int, Drawn]  # by index in step.decoding: with log-probabilities, at the end of its grammar, or failed
    slices: Mapping[int, Drawn]  # by index in step.slices, of those that reach their sequence's end

    @classmethod
    def of_pieces(cls, step: Step, drawn: Mapping[int, Drawn]) -> StepTokens:
        """From what each of `step.pieces()` came to."""
        count = len(step.decoding)
        others = {i: d for i, d in drawn.items() if i < count}
        return cls(np.zeros(count, np.int64), others, {i - count: d for i, d in drawn.items() if i >= count})


def draw(rows: Logits, step: Step) -> StepTokens:
    """Of `rows` one for each of `step.decoding`; then, of each slice that samples, one row after its last token
    and one after each of its drafts."""
    token_ids, others = _draw_decoding(rows, step)
    slices: dict[int, Drawn] = {}
    begin = len(step.decoding)
    for i, piece in enumerate(step.slices):
        if piece.samples:
            slices[i] = _draw_slice(rows, begin, piece)
            begin += 1 + len(piece.drafts)
    return StepTokens(token_ids, others, slices)


def _draw_decoding(rows: Logits, step: Step) -> tuple[Ints, dict[int, Drawn]]:
    columns, lanes = step.lanes, step.decoding.lanes
    token_ids = rows.best[: len(lanes)]
    is_finite = token_ids >= 0
    is_drawn = columns.greedy_from[lanes] <= columns.num_tokens[lanes] if rows.is_drawn is None else rows.is_drawn[: len(lanes)]
    is_plain = is_finite & is_drawn & ~columns.needs_host[lanes]
    if is_plain.all():
        return token_ids, {}
    others = {i: Drawn((), "nonfinite_logits") for i in (~is_finite).nonzero()[0].tolist()}
    asked = (is_finite & ~is_plain).nonzero()[0]
    wanted: dict[int, SampleRow] = {}
    sequences = dict(zip(asked.tolist(), columns.at(lanes[asked]), strict=True))
    for i, sequence in sequences.items():
        if is_drawn[i]:
            others[i] = _take_masked(rows, i, sequence)
            continue
        try:
            wanted[i] = _row(newest(sequence), 0)
        except ConstraintFailed as exc:
            others[i] = Drawn((), exc.reason)
    for i, token in zip(wanted, _sample_each(rows, rows.values[[*wanted]], [*wanted.values()]), strict=True):
        is_over = token is not None and _is_over_after(sequences[i], token)
        if token is not None and token.logprob is None and not is_over:
            token_ids[i] = token.token_id
        else:
            others[i] = Drawn((token,), is_over=is_over) if token is not None else Drawn((), "sampling_failed")
    return token_ids, others


def _draw_slice(rows: Logits, begin: int, piece: Slice) -> Drawn:
    """`begin`: its first row."""
    if rows.best[begin] < 0:
        return Drawn((), "nonfinite_logits")
    if piece.sequence.forks:
        return _draw_forks(rows, begin, piece)
    greedy_from = piece.sequence.greedy_from if rows.is_drawn is None else None
    is_drawn = rows.is_drawn is not None and bool(rows.is_drawn[begin])
    if is_drawn and piece.sequence.needs_host:  # which has no drafts
        return _take_masked(rows, begin, piece.sequence)
    if is_drawn or (greedy_from is not None and piece.end >= greedy_from):
        return Drawn(_verify_plain(rows, begin, piece))
    try:
        row = _row(piece, 0)
    except ConstraintFailed as exc:
        return Drawn((), exc.reason)
    token = _sample_one(rows, rows.values[begin : begin + 1], row)
    return _verify(rows, begin, piece, token) if token is not None else Drawn((), "sampling_failed")


def _take_masked(rows: Logits, row: int, sequence: Sequence) -> Drawn:
    """A token that was drawn under its grammar's mask, which the grammar has to follow."""
    token = SampledToken(int(rows.best[row]), None, ())
    return Drawn((token,), is_over=_is_over_after(sequence, token))


def _draw_forks(rows: Logits, row: int, piece: Slice) -> Drawn:
    """Of one distribution, a token for each choice."""
    asked = [replace(_row(piece, 0), choice=fork.choice) for fork in piece.sequence.forks]
    tokens = _sample_each(rows, rows.values[row].expand(len(asked), -1), asked)
    return Drawn((), forks=tuple(Drawn((), "sampling_failed") if t is None else Drawn((t,)) for t in tokens))


def _verify_plain(rows: Logits, begin: int, piece: Slice) -> tuple[SampledToken, ...]:
    """As `_verify`, where each row's best token is the one."""
    best = rows.best[begin : begin + 1 + len(piece.drafts)].tolist()
    count = 1
    while count < len(best) and _goes_on(rows, begin + count, piece, count, best[count - 1]):
        count += 1
    return tuple(SampledToken(token, None, ()) for token in best[:count])


def _verify(rows: Logits, begin: int, piece: Slice, token: SampledToken) -> Drawn:
    """`token` and what follows it for as long as drafts are right. A row that cannot be sampled ends that as a wrong draft would:
    it is computed again as the next step's first row, and fails the sequence there, after the tokens before it."""
    tokens = [token]
    is_over = _is_over_after(piece.sequence, token)
    while len(tokens) <= len(piece.drafts) and _goes_on(rows, begin + len(tokens), piece, len(tokens), tokens[-1].token_id):
        following = _sample_after(rows, begin + len(tokens), piece, len(tokens)) if not is_over else None
        if following is None:
            break
        tokens.append(following)
        is_over = _is_over_after(piece.sequence, following)
    return Drawn(tuple(tokens), is_over=is_over)


def _sample_after(rows: Logits, at: int, piece: Slice, count: int) -> SampledToken | None:
    """What follows the piece's first `count` drafts, by row `at`."""
    try:
        row = _row(piece, count)
    except ConstraintFailed:
        return None
    return _sample_one(rows, rows.values[at : at + 1], row)


def _is_over_after(sequence: Sequence, token: SampledToken) -> bool:
    """Takes the sequence's grammar past `token`."""
    constraint = sequence.constraint
    if constraint is None:
        return False
    constraint.advance(token.token_id)
    return constraint.is_over


def _goes_on(rows: Logits, row: int, piece: Slice, count: int, token_id: int) -> bool:
    """Whether `row` counts, which follows `count` tokens of which `token_id` is the last."""
    is_right = token_id == piece.drafts[count - 1] and token_id not in piece.sequence.spec.stopping.stop_token_ids
    return is_right and rows.best[row] >= 0


def _sample_each(of: Logits, values: Tensor, rows: Seq[SampleRow]) -> list[SampledToken | None]:
    """values: some rows of `of`. None for a row that raises; the others get the same tokens whether one did or not."""
    try:
        return [*sample(values, rows, of.draw)]
    except Exception:
        return [_sample_one(of, values[i : i + 1], row) for i, row in enumerate(rows)]


def _sample_one(of: Logits, values: Tensor, row: SampleRow) -> SampledToken | None:
    try:
        return sample(values, [row], of.draw)[0]
    except Exception:
        return None


def _row(piece: Slice, num_drafts: int) -> SampleRow:
    """The draw after the piece's first `num_drafts` drafts, as if they were tokens already. ConstraintFailed when the grammar,
    which has followed them, allows no token, or none that is not blocked."""
    sequence = piece.sequence
    spec = sequence.spec
    blocked_ids = spec.stopping.stop_token_ids if sequence.num_output + num_drafts < spec.stopping.min_tokens else frozenset[int]()
    return SampleRow(
        sampling=spec.sampling,
        choice=spec.choice,
        position=sequence.num_tokens + num_drafts,
        prompt_ids=spec.prompt,
        output_ids=[*sequence.tokens[len(spec.prompt) :], *piece.drafts[:num_drafts]] if spec.sampling.has_penalties else (),
        blocked_ids=blocked_ids,
        mask=torch.from_numpy(allowed(sequence.constraint, blocked_ids)) if sequence.constraint is not None else None,
    )
