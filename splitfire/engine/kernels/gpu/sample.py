"""`draw`: ../sample.py's token of each row, without sorting the vocabulary, and the model's own log-probability of it.

The token is argmax(score + noise) over the tokens that survive top-k, top-p and min-p, and those are the tokens above some score. So the
best of *all* tokens is taken first, and if it survives, it is the one: leaving out tokens that did not win changes nothing. If it
does not survive, nothing at or below its score does, and the best above that score is next. Whether a token survives takes the number
and the mass of those above it, which is one more reading; one or two rounds are usual.

A row is read in parts by several programs, twice: for the largest score and the softmax's sum, and for the best with noise. The last of
three launches, a program a row, asks whether it survives where anything is to be survived, and goes through what rounds are left.

Noise in fp32 is exact to a millionth or so; where that could decide, it is computed in fp64 as ../sample.py does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitfire.engine.kernels.gpu.splitmix import mix
from splitfire.engine.kernels.sample import GUMBEL_MAX

PIECE = 2048  # tokens at a time
NONE = -1  # no mask, no adjusted logits; as a token: the row's logits are not finite


@dataclass(frozen=True, slots=True)
class DrawRows:
    """One place for each row, on the device."""

    temperatures: Tensor  # fp32; 0: the most likely token
    top_k: Tensor  # int32; 0: all
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32, its logarithm; -inf: none
    keys: Tensor  # int64: ../sample.py's noise_key
    mask_rows: Tensor  # int32, of `masks`, or NONE
    adjusted_rows: Tensor  # int32, of `adjusted`, or NONE: drawn from the model's own logits


@dataclass(frozen=True, slots=True)
class Drawn:
    """Of each row."""

    tokens: Tensor  # [num_rows] int64, or NONE
    logprobs: Tensor  # [num_rows] fp32


def draw(
    logits: Tensor,  # [num_rows, vocab] fp32, the model's own
    rows: DrawRows,
    masks: Tensor | None,  # [num_masks, ceil(vocab / 32)] int32: bit t % 32 of word t // 32 says whether token t may be drawn
    adjusted: Tensor | None,  # [num_adjusted, vocab] fp32: logits after penalties, bias and blocked tokens
    num_programs: int = 132,
) -> Drawn:
    """Rows never influence one another."""
    num_rows, vocab = logits.shape
    device = logits.device
    drawn = Drawn(torch.empty(num_rows, dtype=torch.int64, device=device), torch.empty(num_rows, device=device))
    if num_rows == 0:
        return drawn
    parts = triton.next_power_of_2(max(1, min(num_programs // num_rows, triton.cdiv(vocab, PIECE), 64)))
    found = torch.empty(num_rows, parts, 4, device=device)
    best = torch.empty(num_rows, parts, dtype=torch.int64, device=device)
    given = (
        logits, logits if adjusted is None else adjusted, logits if masks is None else masks, rows.temperatures, rows.mask_rows,
        rows.adjusted_rows, vocab, 0 if masks is None else masks.stride(0),
    )  # fmt: skip
    known = (parts, PIECE, masks is not None, adjusted is not None)
    _look[num_rows, parts](*given, found, *known, num_warps=8)
    _best[num_rows, parts](*given, rows.keys, best, GUMBEL_MAX, *known, num_warps=8)
    filters = (rows.keys, rows.top_k, rows.top_p, rows.min_p)
    # One program a row goes through the whole vocabulary: many threads, and with eight warps sm_80 spills 40 bytes (ptxas, 2026-11).
    _decide[num_rows,](*given, *filters, found, best, drawn.tokens, drawn.logprobs, GUMBEL_MAX, *known, num_warps=16)
    return drawn


@triton.jit
def scores_of(
    source,  # the row's logits
    mask,  # the row's words
    is_masked,
    temperature,
    token,  # [PIECE]
    vocab,
    HAS_MASKS: tl.constexpr,
):
    """Divided by the temperature; -inf of what may not be drawn."""
    scores = tl.load(source + token, token < vocab, float("-inf"))
    if HAS_MASKS:
        if is_masked:
            word = tl.load(mask + token // 32, token < vocab, 0)
            scores = tl.where((word >> (token % 32)) & 1 == 1, scores, float("-inf"))
    return tl.div_rn(scores, tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def source_of(
    logits, adjusted, masks, mask_rows, adjusted_rows, row, vocab, mask_stride, HAS_MASKS: tl.constexpr, HAS_ADJUSTED: tl.constexpr
):
    """Where a row's logits are, and its mask."""
    source = logits + row.to(tl.int64) * vocab
    if HAS_ADJUSTED:
        other = tl.load(adjusted_rows + row)
        if other >= 0:
            source = adjusted + other.to(tl.int64) * vocab
    mask = masks
    is_masked = False
    if HAS_MASKS:
        mask_row = tl.load(mask_rows + row)
        is_masked = mask_row >= 0
        mask = masks + tl.maximum(mask_row, 0).to(tl.int64) * mask_stride
    return source, mask, is_masked


@triton.jit
def share_of(part, vocab, PARTS: tl.constexpr, PIECE: tl.constexpr):
    """Tokens [begin, end) of a part."""
    pieces = (vocab + PIECE - 1) // PIECE
    each = (pieces + PARTS - 1) // PARTS
    begin = tl.minimum(part * each * PIECE, vocab)
    return begin, tl.minimum(begin + each * PIECE, vocab)


@triton.jit
def uniform_bits(key, token):
    """Of key and token id, the high 32 bits."""
    return mix(key.to(tl.uint64, bitcast=True), token + 1) >> 32


@triton.jit
def gumbel_about(bits):
    """fp32. Near one, where noise is large, 1 - u has all its digits and u has not."""
    rest = (4294967295.5 - bits.to(tl.float64)).to(tl.float32) * 2.3283064365386963e-10
    u = (bits.to(tl.float64) + 0.5).to(tl.float32) * 2.3283064365386963e-10
    series = rest * (1.0 + rest * (0.5 + rest * (0.33333333 + rest * (0.25 + rest * 0.2))))
    return -tl.log(tl.where(rest < 0.03125, series, -tl.log(u)))


@triton.jit
def gumbel(bits):
    """fp64, as ../sample.py."""
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10))


@triton.jit
def best_of(
    source, mask, is_masked, temperature, key, begin, end, low, lost, limit, PIECE: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """The token in [begin, end) with the largest score + noise, of those that rank before `lost`, whose score is `low`; the lowest of
    equals, or -1."""
    best = tl.full([], -1, tl.int32)
    most = tl.full([], float("-inf"), tl.float64)
    floor = tl.full([], float("-inf"), tl.float32)
    for at in range(begin, end, PIECE):
        token = at + tl.arange(0, PIECE)
        scores = scores_of(source, mask, is_masked, temperature, token, end, HAS_MASKS)
        scores = tl.where((scores > low) | ((scores == low) & (token < lost)), scores, float("-inf"))
        top = tl.max(scores, 0)
        if (top > float("-inf")) & (top + limit >= floor):
            bits = uniform_bits(key, token)
            about = scores + tl.where(temperature > 0, gumbel_about(bits), 0.0)
            if tl.max(about, 0) >= floor:
                sums = scores.to(tl.float64) + tl.where(temperature > 0, gumbel(bits), 0.0)
                here = tl.max(sums, 0)
                if here > most:
                    best = tl.min(tl.where(sums == here, token, 2147483647), 0)
                    most = here
                    floor = here.to(tl.float32) - 0.001  # more than `about` errs by
    return best, most


@triton.jit
def above(
    source, mask, is_masked, temperature, score, candidate, end, high, PIECE: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """Of all tokens: how many score more than `score`, and the mass (of e^(score - high)) of those that rank before the candidate, which
    among equals the lower ids do; and the mass of all that score as much or more."""
    number = tl.full([], 0, tl.int32)
    before = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    for at in range(0, end, PIECE):
        token = at + tl.arange(0, PIECE)
        scores = scores_of(source, mask, is_masked, temperature, token, end, HAS_MASKS)
        weights = tl.exp(scores - high)
        number += tl.sum((scores > score).to(tl.int32), 0)
        before += tl.sum(tl.where((scores > score) | ((scores == score) & (token < candidate)), weights, 0.0), 0)
        mass += tl.sum(tl.where(scores >= score, weights, 0.0), 0)
    return number, before, mass


@triton.jit
def score_of_rank(source, mask, is_masked, temperature, rank, end, PIECE: tl.constexpr, HAS_MASKS: tl.constexpr):
    """The largest score that `rank` tokens reach: bit by bit, in the order of floats."""
    found = tl.full([], 0, tl.uint32)
    for bit in range(32):
        tried = found | (tl.full([], 1, tl.uint32) << (31 - bit))
        score = float_of(tried)
        number = tl.full([], 0, tl.int32)
        for at in range(0, end, PIECE):
            token = at + tl.arange(0, PIECE)
            scores = scores_of(source, mask, is_masked, temperature, token, end, HAS_MASKS)
            number += tl.sum(((scores >= score) & (token < end)).to(tl.int32), 0)
        found = tl.where(number >= rank, tried, found)
    return float_of(found)


@triton.jit
def float_of(order):
    """The float whose place in the order of floats this is."""
    bits = tl.where(order >= 0x80000000, order ^ 0x80000000, order ^ 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _look(
    logits, adjusted, masks, temperatures, mask_rows, adjusted_rows, vocab, mask_stride,
    found,  # [rows, PARTS, 4], written: largest logit, sum of e^(logit - it), how many are not finite, largest score
    PARTS: tl.constexpr, PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_ADJUSTED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    source, mask, is_masked = source_of(
        logits, adjusted, masks, mask_rows, adjusted_rows, row, vocab, mask_stride, HAS_MASKS, HAS_ADJUSTED
    )
    temperature = tl.load(temperatures + row)
    begin, end = share_of(part, vocab, PARTS, PIECE)
    top = tl.full([], float("-inf"), tl.float32)
    high = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    wrong = tl.full([], 0, tl.int32)
    for at in range(begin, end, PIECE):
        token = at + tl.arange(0, PIECE)
        x = tl.load(logits + row.to(tl.int64) * vocab + token, token < end, float("-inf"))
        is_wrong = ((x != x) | (tl.abs(x) == float("inf"))) & (token < end)
        wrong += tl.sum(is_wrong.to(tl.int32), 0)
        new_top = tl.maximum(top, tl.max(tl.where(is_wrong, float("-inf"), x), 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.sum(tl.where(is_wrong, 0.0, tl.exp(x - base)), 0)
        top = new_top
        high = tl.maximum(high, tl.max(scores_of(source, mask, is_masked, temperature, token, end, HAS_MASKS), 0))
    to = found + (row * PARTS + part) * 4
    tl.store(to, top)
    tl.store(to + 1, total)
    tl.store(to + 2, wrong.to(tl.float32))
    tl.store(to + 3, high)


@triton.jit
def _best(
    logits, adjusted, masks, temperatures, mask_rows, adjusted_rows, vocab, mask_stride, keys,
    best,  # [rows, PARTS], written
    limit,
    PARTS: tl.constexpr, PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_ADJUSTED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    source, mask, is_masked = source_of(
        logits, adjusted, masks, mask_rows, adjusted_rows, row, vocab, mask_stride, HAS_MASKS, HAS_ADJUSTED
    )
    temperature, key = tl.load(temperatures + row), tl.load(keys + row)
    begin, end = share_of(part, vocab, PARTS, PIECE)
    token, most = best_of(source, mask, is_masked, temperature, key, begin, end, float("-inf"), -1, limit, PIECE, HAS_MASKS)
    tl.store(best + row * PARTS + part, token.to(tl.int64))


@triton.jit
def _decide(
    logits, adjusted, masks, temperatures, mask_rows, adjusted_rows, vocab, mask_stride, keys, top_ks, top_ps, min_ps, found, best,
    tokens,  # [rows], written
    logprobs,  # [rows], written
    limit,
    PARTS: tl.constexpr, PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_ADJUSTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    source, mask, is_masked = source_of(
        logits, adjusted, masks, mask_rows, adjusted_rows, row, vocab, mask_stride, HAS_MASKS, HAS_ADJUSTED
    )
    temperature, key = tl.load(temperatures + row), tl.load(keys + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    part = found + (row * PARTS + tl.arange(0, PARTS)) * 4
    tops, totals = tl.load(part), tl.load(part + 1)
    top, high = tl.max(tops, 0), tl.max(tl.load(part + 3), 0)
    log_total = top + tl.log(tl.sum(totals * tl.exp(tops - top), 0))

    # The best of the parts.
    bests = tl.load(best + row * PARTS + tl.arange(0, PARTS)).to(tl.int32)
    at = tl.maximum(bests, 0)
    sums = scores_of(source, mask, is_masked, temperature, at, vocab, HAS_MASKS).to(tl.float64)
    sums += tl.where(temperature > 0, gumbel(uniform_bits(key, at)), 0.0)
    sums = tl.where(bests >= 0, sums, float("-inf"))
    candidate = tl.min(tl.where(sums == tl.max(sums, 0), at, 2147483647), 0)

    has_rank = (top_k > 0) & (top_k < vocab)
    wrong = tl.sum(tl.load(part + 2), 0) > 0
    is_open = (not wrong) & (temperature > 0) & (has_rank | (top_p < 1.0) | (min_p > float("-inf")))
    all_mass = tl.full([], 0.0, tl.float32)  # of what survives top-k; 0: not known yet
    while is_open:
        score = tl.max(scores_of(source, mask, is_masked, temperature, candidate + tl.arange(0, 1), vocab, HAS_MASKS), 0)
        number, before, mass = above(source, mask, is_masked, temperature, score, candidate, vocab, high, PIECE, HAS_MASKS)
        survives = ((min_p == float("-inf")) | (score >= high + min_p)) & ((number < top_k) | (not has_rank))
        # The first of all survives whatever top-p is; and `mass` is part of what survives top-k, so it may be enough to know.
        if survives & (top_p < 1.0) & (before > 0.0) & (before >= top_p * mass):
            if all_mass == 0.0:
                low = float("-inf")
                if has_rank:
                    low = score_of_rank(source, mask, is_masked, temperature, top_k, vocab, PIECE, HAS_MASKS)
                unused, unused_before, all_mass = above(source, mask, is_masked, temperature, low, 0, vocab, high, PIECE, HAS_MASKS)
            survives = before < top_p * all_mass
        is_open = not survives
        if is_open:
            candidate, most = best_of(
                source, mask, is_masked, temperature, key, 0, vocab, score, candidate, limit, PIECE, HAS_MASKS
            )
            is_open = candidate >= 0
    tl.store(tokens + row, tl.where(wrong, -1, candidate).to(tl.int64))
    tl.store(
        logprobs + row, tl.load(logits + row.to(tl.int64) * vocab + tl.minimum(tl.maximum(candidate, 0), vocab - 1)) - log_total
    )
