// Registers of integers and floats for products of bf16, on processors with an instruction that multiplies bf16 pairs and
// adds up the products (AVX512-BF16).
//
// A "pair" is a 32-bit number that holds two neighbouring bf16 of a product's inner dimension, the first in its low half.

#pragma once

#include <immintrin.h>

#include "common.h"

// The build defines MAY_USE_TILES if this process may use tiles (AMX): the system can refuse them although the processor has
// them. If the compiler does not support tiles, there are no products here, because PyTorch's products in tiles are several
// times as fast as products in registers. Without AVX512-BF16 there are none either.
#if defined(MAY_USE_TILES) && !(defined(__AMX_TILE__) && defined(__AMX_BF16__))
#elif defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PRODUCTS 1
#ifdef MAY_USE_TILES
#define HAS_TILES 1
#endif
#endif

#ifdef HAS_PRODUCTS

namespace {

constexpr int64_t LANE = LANES;  // 32-bit numbers of a register
constexpr int64_t LINE = 32;     // bf16 of a cache line

// The lowest `count` of 32 bits; `count` may lie outside of [0, 32].
INLINE uint32_t first_bits(int64_t count) { return count >= 32 ? ~0u : (1u << (count > 0 ? count : 0)) - 1; }

typedef __m512i Bits;

INLINE Bits load_bits(const void* from) { return _mm512_loadu_si512(from); }
INLINE void store_bits(void* to, Bits x) { _mm512_storeu_si512(to, x); }
INLINE void stream_bits(void* to, Bits x) { _mm512_stream_si512(static_cast<__m512i*>(to), x); }

// The first `count` 16-bit numbers, then zeros.
INLINE Bits load_some(const void* from, int64_t count) { return _mm512_maskz_loadu_epi16(first_bits(count), from); }

// 16-bit numbers, each in a 32-bit lane: a full register, or the first `count`, then zeros.
INLINE Bits spread(const bf16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
INLINE Bits spread_some(const bf16* x, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(count)), x));
}

INLINE Bits paired(Bits low, Bits high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }

// Pairs of two rows, column by column. Each quarter of a register has eight columns: of these the first or the last four.
INLINE Bits paired_low(Bits first, Bits second) { return _mm512_unpacklo_epi16(first, second); }
INLINE Bits paired_high(Bits first, Bits second) { return _mm512_unpackhi_epi16(first, second); }

INLINE void transpose(Bits (&r)[LANE]) {
    Bits t[16], u[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Quarter l of u[4 i + j] now holds column 4 l + j of the rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const Bits even_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        const Bits odd_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const Bits even_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const Bits odd_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

INLINE Floats twice_each(const float* half) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return (Floats)_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(half)));
}
INLINE Floats neighbours_swapped(Floats x) { return (Floats)_mm512_permute_ps((__m512)x, 0xb1); }
// The numbers at even places negated.
INLINE Floats even_negative(Floats x) {
    return (Floats)_mm512_mask_sub_ps((__m512)x, 0x5555, _mm512_setzero_ps(), (__m512)x);
}

// A set of lanes.
typedef __mmask16 Mask;

INLINE Ints numbered() { return (Ints)_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
// Lane i stands for column `first` + i: the lanes whose columns lie before `live`.
INLINE Mask before(int64_t first, int64_t live) {
    return _mm512_cmplt_epi32_mask((__m512i)numbered(), _mm512_set1_epi32(static_cast<int32_t>(live - first)));
}
INLINE Mask others(Mask mask) { return static_cast<Mask>(~mask); }
INLINE Floats chosen(Mask mask, Floats x, Floats other) { return (Floats)_mm512_mask_mov_ps((__m512)other, mask, (__m512)x); }
INLINE Floats larger(Floats x, Floats y) {  // y if one of them is NaN
    return chosen(_mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ), x, y);
}

INLINE void put_lane(bf16* to, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
INLINE void put_lanes(bf16* to, Floats low, Floats high) {
    store_bits(to, (Bits)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
INLINE void stream_lanes(bf16* to, Floats low, Floats high) {
    stream_bits(to, (Bits)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

INLINE void put_lane(float* to, Floats x) { store(to, x); }

inline int64_t whole_lanes(int64_t n) { return (n + LANE - 1) / LANE * LANE; }

}  // namespace

#endif
