// Products of small bf16 matrices in float32 registers, for processors with AVX512-BF16, and the layouts that they read.
//
// The instruction adds up two neighbouring products at once. So the left operand is read in pairs of neighbours along the
// inner dimension, as rows lie in memory; the right one comes as "pairs", [inner / 2, columns] numbers of 32 bits, each the
// two bf16 that one column has there. A transposed matrix becomes pairs by transposing 32-bit numbers (`pairs_of_columns`),
// a plain one by interleaving two rows (`pairs_of_rows`).

#pragma once

#include <immintrin.h>

#include "cpu_common.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PRODUCTS 1

namespace {

constexpr int64_t LANE = 16;  // columns of a register

inline int64_t whole_lanes(int64_t n) { return (n + LANE - 1) / LANE * LANE; }

// c[R, 16 C] (+)= a b. Strides count numbers of their own type.
template <int R, int C>
inline __attribute__((noinline)) void tile(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                                           int64_t pairs, float* c, int64_t c_stride, bool add) {
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * c_stride + j * LANE) : _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; ++p) {
        __m512i right[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) right[j] = _mm512_loadu_si512(b + p * b_stride + j * LANE);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            int32_t pair;
            std::memcpy(&pair, a + i * a_stride + 2 * p, sizeof pair);
            const __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + i * c_stride + j * LANE, sum[i][j]);
    }
}

constexpr int TILE_ROWS = 6, TILE_LANES = 4;

using Tile = void (*)(const bf16*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);

constexpr Tile TILES[TILE_ROWS][TILE_LANES] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>},
};

// c[rows, columns] (+)= a b, with a [rows, 2 pairs] and b [pairs, columns] of pairs; columns a multiple of 16.
inline void multiply(const bf16* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride, int64_t columns,
                     int64_t pairs, float* c, int64_t c_stride, bool add) {
    // Tiles of about the same size: a small one at the end would wait for its own results.
    const int64_t lanes = columns / LANE, across = (lanes + TILE_LANES - 1) / TILE_LANES;
    const int64_t down = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t x = 0; x < across; ++x) {
        const Share lane = share(lanes, static_cast<int>(x), static_cast<int>(across));
        for (int64_t y = 0; y < down; ++y) {
            const Share row = share(rows, static_cast<int>(y), static_cast<int>(down));
            TILES[row.last - row.first - 1][lane.last - lane.first - 1](
                a + row.first * a_stride, a_stride, b + lane.first * LANE, b_stride, pairs,
                c + row.first * c_stride + lane.first * LANE, c_stride, add);
        }
    }
}

INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16], u[16];
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
    // Of u[4 i + j], the quarter l has column 4 l + j of the rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// out[j, i] = in[i, j] for 32-bit numbers, with zeros for i from `rows` to the next multiple of 16.
inline void transposed(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                       int64_t out_stride) {
    for (int64_t i = 0; i < rows; i += LANE) {
        for (int64_t j = 0; j < columns; j += LANE) {
            const int64_t left = columns - j;
            const __mmask16 some = left >= LANE ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
            __m512i r[16];
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k) {
                const __mmask16 mask = i + k < rows ? some : 0;
                r[k] = _mm512_maskz_loadu_epi32(mask, in + (i + k) * in_stride + j);
            }
            transpose(r);
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k) {
                if (j + k < columns) _mm512_storeu_si512(out + (j + k) * out_stride + i, r[k]);
            }
        }
    }
}

// x^T as pairs along x's columns, [width / 2, rows]: x is bf16 [rows, width].
inline void pairs_of_columns(const bf16* x, int64_t stride, int64_t rows, int64_t width, uint32_t* out, int64_t out_stride) {
    transposed(reinterpret_cast<const uint32_t*>(x), stride / 2, rows, width / 2, out, out_stride);
}

INLINE __m512i wide_bits(const bf16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// x as pairs along its rows, [pairs, width]: x is bf16 [rows, width], with zeros behind its rows; width a multiple of 16.
inline void pairs_of_rows(const bf16* x, int64_t stride, int64_t rows, int64_t width, int64_t pairs, uint32_t* out) {
    for (int64_t i = 0; i < pairs; ++i) {
        for (int64_t j = 0; j < width; j += LANE) {
            const __m512i low = 2 * i < rows ? wide_bits(x + 2 * i * stride + j) : _mm512_setzero_si512();
            const __m512i high = 2 * i + 1 < rows ? wide_bits(x + (2 * i + 1) * stride + j) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + i * width + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

INLINE __m512 widened(const bf16* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(wide_bits(x), 16)); }

INLINE void narrow(bf16* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

}  // namespace

#endif
