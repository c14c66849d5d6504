// The draw of ../sample.py: the token with the largest score + noise of those that survive top-k, top-p and min-p. Nothing is sorted.
//
// Those that survive are the ones above some score. So the best of all tokens is taken first, and if it survives, it is the one; if not,
// nothing at or below its score does, and the best above that is next. Whether one survives takes the number and the mass of those above it.
// Noise is computed in fp32 first, to a millionth or so, and in fp64, as there, where that could decide.

#pragma once

#include "simd.h"

namespace {

constexpr float MOST_NOISE = 22.8741f;     // GUMBEL_MAX of ../sample.py, rounded up
constexpr float NOISE_MARGIN = 0.001f;     // more than noise in fp32 errs by
constexpr double PER_UNIT = 0x1p-32;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, MIX_1 = 0xBF58476D1CE4E5B9, MIX_2 = 0x94D049BB133111EB;

struct Draw {  // twin of step.py's
    const float* logits;
    int64_t vocab;
    float temperature;  // above 0
    int64_t top_k;      // 0: all
    float top_p;
    float min_p;        // its logarithm
    uint64_t key;       // noise_key of ../sample.py
};

// log x of positive numbers to some units in the last place: its exponent, and twice the area tangent of (m - 1) / (m + 1).
INLINE Floats logarithm(Floats x) {
    const Floats m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), e = _mm512_getexp_ps(_mm512_div_ps(x, m));
    const Floats s = _mm512_div_ps(_mm512_sub_ps(m, splat(1.0f)), _mm512_add_ps(m, splat(1.0f))), square = _mm512_mul_ps(s, s);
    Floats p = splat(2.0f / 9);
    for (const float c : {2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) p = fma(p, square, splat(c));
    return fma(e, splat(0.69314718f), _mm512_mul_ps(p, s));
}

// SplitMix64 of key and token id, its high 32 bits.
INLINE __m512i mixed(__m512i tokens, uint64_t key) {
    const auto all = [](uint64_t x) { return _mm512_set1_epi64(int64_t(x)); };
    __m512i x = _mm512_add_epi64(_mm512_mullo_epi64(_mm512_add_epi64(tokens, all(1)), all(GOLDEN)), all(key));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)), all(MIX_1));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)), all(MIX_2));
    return _mm512_srli_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 31)), 32);
}

INLINE __m512i uniform_bits(int64_t token, uint64_t key) {  // of sixteen tokens
    const __m512i first = _mm512_add_epi64(_mm512_set1_epi64(token), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i low = _mm512_cvtepi64_epi32(mixed(first, key)), high = _mm512_cvtepi64_epi32(mixed(_mm512_add_epi64(first, _mm512_set1_epi64(8)), key));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// -log(-log u), u = (bits + 1/2) / 2^32. Where noise is large u is near one, and 1 - u has the digits that u has not.
INLINE Floats noise_about(__m512i bits) {
    const Floats unit = splat(float(PER_UNIT)), half = splat(0.5f);
    const Floats u = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepu32_ps(bits), half), unit);
    const Floats rest = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepu32_ps(_mm512_xor_si512(bits, _mm512_set1_epi32(-1))), half), unit);
    Floats series = splat(0.2f);
    for (const float c : {0.25f, 1.0f / 3, 0.5f, 1.0f}) series = fma(series, rest, splat(c));
    const Floats plain = _mm512_sub_ps(_mm512_setzero_ps(), logarithm(u));
    const __mmask16 is_near = _mm512_cmp_ps_mask(rest, splat(0.03125f), _CMP_LT_OQ);
    return _mm512_sub_ps(_mm512_setzero_ps(), logarithm(_mm512_mask_mul_ps(plain, is_near, series, rest)));
}

INLINE double noise(uint32_t bits) { return -std::log(-std::log((double(bits) + 0.5) * PER_UNIT)); }

INLINE Floats scores_from(const Draw& draw, int64_t token) {  // -inf past the last
    const __mmask16 there = lanes_of(token, draw.vocab);
    return _mm512_div_ps(_mm512_mask_loadu_ps(splat(-INFINITY), there, draw.logits + token), splat(draw.temperature));
}

// The token with the largest score + noise of those that rank before `lost`, whose score is `low`; the lowest of equals; -1: there is none.
int64_t best_before(const Draw& draw, float low, int64_t lost) {
    int64_t best = -1;
    double most = -INFINITY;
    float floor = -INFINITY;
    for (int64_t token = 0; token < draw.vocab; token += LANES) {
        const Floats scores = scores_from(draw, token);
        __mmask16 open = _mm512_cmp_ps_mask(scores, splat(low), _CMP_GT_OQ) | (_mm512_cmp_ps_mask(scores, splat(low), _CMP_EQ_OQ) & lanes_of(token, lost));
        open &= _mm512_cmp_ps_mask(_mm512_add_ps(scores, splat(MOST_NOISE)), splat(floor), _CMP_GE_OQ) & _mm512_cmp_ps_mask(scores, splat(-INFINITY), _CMP_NEQ_OQ);
        if (!open) continue;
        const __m512i bits = uniform_bits(token, draw.key);
        const Floats about = _mm512_add_ps(scores, noise_about(bits));
        open &= _mm512_cmp_ps_mask(about, splat(floor), _CMP_GE_OQ);
        if (!open) continue;
        alignas(64) float score[LANES];
        alignas(64) uint32_t bit[LANES];
        store(score, scores), _mm512_store_si512(bit, bits);
        while (open) {  // the most promising first: it shuts the others out
            const float top = _mm512_mask_reduce_max_ps(open, about);
            const int lane = __builtin_ctz(_mm512_mask_cmp_ps_mask(open, about, splat(top), _CMP_EQ_OQ));
            const double sum = double(score[lane]) + noise(bit[lane]);
            if (sum > most || (sum == most && token + lane < best)) best = token + lane, most = sum, floor = float(sum) - NOISE_MARGIN;
            open &= __mmask16(~(1u << lane)) & _mm512_cmp_ps_mask(about, splat(floor), _CMP_GE_OQ);
        }
    }
    return best;
}

struct Above {
    int64_t count = 0;               // tokens with larger scores
    double before = 0.0, mass = 0.0; // of e^(score - high): of what ranks before the candidate, lower ids first among equals; of all that score as much
};

Above look_above(const Draw& draw, float score, int64_t candidate, float high) {
    Above above;
    __m512d before[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()}, mass[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    const auto add = [](__m512d* sums, Floats x) __attribute__((always_inline)) {
        sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
        sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    };
    for (int64_t token = 0; token < draw.vocab; token += LANES) {
        const Floats scores = scores_from(draw, token);
        const __mmask16 larger = _mm512_cmp_ps_mask(scores, splat(score), _CMP_GT_OQ);
        const __mmask16 equal = _mm512_cmp_ps_mask(scores, splat(score), _CMP_EQ_OQ) & lanes_of(token, draw.vocab);
        if (!(larger | equal)) continue;
        const Floats weights = exponential(_mm512_sub_ps(scores, splat(high)));
        above.count += __builtin_popcount(larger);
        add(before, _mm512_maskz_mov_ps(larger | (equal & lanes_of(token, candidate)), weights));
        add(mass, _mm512_maskz_mov_ps(larger | equal, weights));
    }
    above.before = _mm512_reduce_add_pd(_mm512_add_pd(before[0], before[1]));
    above.mass = _mm512_reduce_add_pd(_mm512_add_pd(mass[0], mass[1]));
    return above;
}

// The largest score that `rank` tokens reach: bit by bit, in the order of floats.
float score_of_rank(const Draw& draw, int64_t rank) {
    const auto at = [](uint32_t order) { return float_of(order >> 31 ? order ^ 0x80000000 : ~order); };
    uint32_t found = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        const float score = at(found | bit);
        int64_t count = 0;
        for (int64_t token = 0; token < draw.vocab; token += LANES) {
            count += __builtin_popcount(_mm512_cmp_ps_mask(scores_from(draw, token), splat(score), _CMP_GE_OQ) & lanes_of(token, draw.vocab));
        }
        if (count >= rank) found |= bit;
    }
    return at(found);
}

int64_t draw_token(const Draw& draw) {
    Floats tops = splat(-INFINITY);
    for (int64_t token = 0; token < draw.vocab; token += LANES) tops = _mm512_max_ps(tops, scores_from(draw, token));
    const float high = largest(tops);
    const bool has_rank = 0 < draw.top_k && draw.top_k < draw.vocab, is_filtered = has_rank || draw.top_p < 1.0f || draw.min_p > -INFINITY;
    int64_t candidate = best_before(draw, -INFINITY, 0);
    double all = 0.0;  // the mass of what survives top-k; 0: not known yet
    while (is_filtered && candidate >= 0) {
        const float score = draw.logits[candidate] / draw.temperature;
        const Above above = look_above(draw, score, candidate, high);
        bool survives = (draw.min_p == -INFINITY || score >= high + draw.min_p) && (!has_rank || above.count < draw.top_k);
        // The first of all survives whatever top-p is; and `mass` is part of what survives top-k, so it may be enough to know.
        if (survives && draw.top_p < 1.0f && above.before > 0.0 && above.before >= draw.top_p * above.mass) {
            if (all == 0.0) all = look_above(draw, has_rank ? score_of_rank(draw, draw.top_k) : -INFINITY, 0, high).mass;
            survives = above.before < draw.top_p * all;
        }
        if (survives) break;
        candidate = best_before(draw, score, candidate);
    }
    return candidate;
}

}  // namespace
