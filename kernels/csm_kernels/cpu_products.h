// Products of small bf16 matrices in float32 registers, for processors with AVX512-BF16, and the layouts that they read.
//
// The instruction adds up two neighbouring products at once. So the left operand is read in pairs of neighbours along the
// inner dimension, as rows lie in memory; the right one comes as "pairs", [inner / 2, columns] numbers of 32 bits, each the
// two bf16 that one column has there. A transposed matrix becomes pairs by transposing 32-bit numbers (`pairs_of_columns`),
// a plain one by interleaving two rows (`pairs_of_rows`).

#pragma once

#include <immintrin.h>

#include "cpu_common.h"

// Where there are tiles for it (AMX), PyTorch's products are several times as fast as these could be.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define HAS_PRODUCTS 1

namespace {

constexpr int64_t LANE = 16;  // columns of a register

inline int64_t whole_lanes(int64_t n) { return (n + LANE - 1) / LANE * LANE; }

INLINE __m512i wide_bits(const bf16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

INLINE __m512 widened(const bf16* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(wide_bits(x), 16)); }

INLINE void put_lane(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
INLINE void put_lane(bf16* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// c[R, 16 C] = a b, or plus + a b; plus has c's stride, and may be c. Strides count numbers of their own type.
template <int R, int C, class T>
inline __attribute__((noinline)) void tile(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                                           int64_t pairs, T* c, int64_t c_stride, const T* plus) {
    __m512 sum[R][C];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[i][j] = _mm512_setzero_ps();
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
        for (int j = 0; j < C; ++j) {
            const int64_t at = i * c_stride + j * LANE;
            put_lane(c + at, plus ? _mm512_add_ps(sum[i][j], (__m512)load(plus + at)) : sum[i][j]);
        }
    }
}

constexpr int TILE_ROWS = 6, TILE_LANES = 4;

template <class T>
using Tile = void (*)(const bf16*, int64_t, const uint32_t*, int64_t, int64_t, T*, int64_t, const T*);

template <class T>
constexpr Tile<T> TILES[TILE_ROWS][TILE_LANES] = {
    {tile<1, 1, T>, tile<1, 2, T>, tile<1, 3, T>, tile<1, 4, T>}, {tile<2, 1, T>, tile<2, 2, T>, tile<2, 3, T>, tile<2, 4, T>},
    {tile<3, 1, T>, tile<3, 2, T>, tile<3, 3, T>, tile<3, 4, T>}, {tile<4, 1, T>, tile<4, 2, T>, tile<4, 3, T>, tile<4, 4, T>},
    {tile<5, 1, T>, tile<5, 2, T>, tile<5, 3, T>, tile<5, 4, T>}, {tile<6, 1, T>, tile<6, 2, T>, tile<6, 3, T>, tile<6, 4, T>},
};

// c[rows, columns] = a b, or plus + a b, with a [rows, 2 pairs] and b [pairs, columns] of pairs; columns a multiple
// of 16. From the last columns to the first: what a row writes too much behind itself is the next row's, and written again.
template <class T>
inline void multiply(const bf16* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride, int64_t columns,
                     int64_t pairs, T* c, int64_t c_stride, const T* plus = nullptr) {
    // Tiles of about the same size: a small one at the end would wait for its own results.
    const int64_t lanes = columns / LANE, across = (lanes + TILE_LANES - 1) / TILE_LANES;
    const int64_t down = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t x = across; x-- > 0;) {
        const Share lane = share(lanes, static_cast<int>(x), static_cast<int>(across));
        for (int64_t y = 0; y < down; ++y) {
            const Share row = share(rows, static_cast<int>(y), static_cast<int>(down));
            TILES<T>[row.last - row.first - 1][lane.last - lane.first - 1](
                a + row.first * a_stride, a_stride, b + lane.first * LANE, b_stride, pairs,
                c + row.first * c_stride + lane.first * LANE, c_stride,
                plus ? plus + row.first * c_stride + lane.first * LANE : nullptr);
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

// The first `left` of 32 numbers of 16 bits.
INLINE __mmask32 first_halves(int64_t left) { return left >= 32 ? ~0u : (1u << (left > 0 ? left : 0)) - 1; }

// Rows as columns of 32-bit numbers: out[j, i] = in[i, j]. A row has `halves` numbers of 16 bits, the last 32-bit number is
// filled up with zeros; so are the columns of `out` from `rows` to the next multiple of 16. `in_stride` counts halves.
inline void transposed(const void* in, int64_t in_stride, int64_t rows, int64_t halves, uint32_t* out, int64_t out_stride) {
    const uint16_t* from = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < rows; i += LANE) {
        for (int64_t j = 0; 2 * j < halves; j += LANE) {
            const uint16_t* block = from + i * in_stride + 2 * j;
            uint32_t* to = out + j * out_stride + i;
            __m512i r[16];
            if (rows - i >= LANE && halves - 2 * j >= 2 * LANE) {
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(block + k * in_stride);
                transpose(r);
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) _mm512_storeu_si512(to + k * out_stride, r[k]);
                continue;
            }
            const __mmask32 some = first_halves(halves - 2 * j);
            for (int k = 0; k < 16; ++k) r[k] = _mm512_maskz_loadu_epi16(i + k < rows ? some : 0, block + k * in_stride);
            transpose(r);
            for (int k = 0; k < 16 && 2 * (j + k) < halves; ++k) _mm512_storeu_si512(to + k * out_stride, r[k]);
        }
    }
}

// x^T as pairs along x's columns, [width / 2, rows]: x is bf16 [rows, width].
inline void pairs_of_columns(const bf16* x, int64_t stride, int64_t rows, int64_t width, uint32_t* out, int64_t out_stride) {
    transposed(x, stride, rows, width, out, out_stride);
}

// x as pairs along its rows, [pairs, width]: x is bf16 [rows, width], with zeros behind its rows, and behind its columns up
// to the next multiple of 16, which is `out`'s stride.
inline void pairs_of_rows(const bf16* x, int64_t stride, int64_t rows, int64_t width, int64_t pairs, uint32_t* out) {
    const int64_t out_stride = whole_lanes(width), full = width / LANE * LANE;
    for (int64_t i = 0; i < pairs; ++i) {
        const bf16* row = x + 2 * i * stride;
        uint32_t* to = out + i * out_stride;
        const bool has_low = 2 * i < rows, has_high = 2 * i + 1 < rows;
        if (has_high) {
            for (int64_t j = 0; j < full; j += LANE) {
                const __m512i odd = _mm512_slli_epi32(wide_bits(row + stride + j), 16);
                _mm512_storeu_si512(to + j, _mm512_or_si512(wide_bits(row + j), odd));
            }
        }
        for (int64_t j = has_high ? full : 0; j < width; j += LANE) {
            const __mmask16 some = static_cast<__mmask16>(first_halves(width - j));
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_low ? some : 0, row + j));
            const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(has_high ? some : 0, row + stride + j));
            _mm512_storeu_si512(to + j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

}  // namespace

#endif
