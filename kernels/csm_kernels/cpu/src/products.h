// Products of small bf16 matrices in float32 registers, and the layouts of their operands.
//
// The left matrix is read in pairs of neighbours along the inner dimension, as its rows lie in memory. The right matrix is
// stored as "pairs", [inner / 2, columns] 32-bit numbers, each with the two bf16 of one column. A transposed matrix becomes
// pairs by transposing 32-bit numbers (`pairs_of_columns`), another one by interleaving two rows (`pairs_of_rows`).

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "lanes.h"
#include "tiles.h"

#ifdef HAS_PRODUCTS

namespace {

constexpr int TILE_ROWS = 6, TILE_LANES = 4;

// sum[i][j] += the product of the pair of row i at `a` and the pairs at `b`.
template <int R, int C>
INLINE void add_products(Floats (&sum)[R][C], const bf16* a, int64_t a_stride, const uint32_t* b) {
    Bits right[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) right[j] = load_bits(b + j * LANE);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * a_stride, sizeof pair);
        const Bits left = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
            sum[i][j] = (Floats)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
}

// c[R, C registers] = a b, or plus + a b; plus has the stride of c, and may be c. Strides count elements. If `inner` is odd,
// the memory after the rows of a is not read.
template <int R, int C, class T>
inline __attribute__((noinline)) void tile(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                                           int64_t inner, T* c, int64_t c_stride, const T* plus) {
    Floats sum[R][C];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sum[i][j] = Floats{};
    }
    const int64_t pairs = inner / 2;
    for (int64_t p = 0; p < pairs; ++p) add_products(sum, a + 2 * p, a_stride, b + p * b_stride);
    if (inner % 2) {
        bf16 last[2 * R] = {};
        for (int i = 0; i < R; ++i) last[2 * i] = a[i * a_stride + 2 * pairs];
        add_products(sum, last, 2, b + pairs * b_stride);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
            const int64_t at = i * c_stride + j * LANE;
            put_lane(c + at, plus ? sum[i][j] + load(plus + at) : sum[i][j]);
        }
    }
}

template <class T>
using Tile = void (*)(const bf16*, int64_t, const uint32_t*, int64_t, int64_t, T*, int64_t, const T*);

template <class T, int R, int... C>
constexpr std::array<Tile<T>, TILE_LANES> tiles_of(std::integer_sequence<int, C...>) {
    return {tile<R, C + 1, T>...};
}

template <class T, int... R>
constexpr std::array<std::array<Tile<T>, TILE_LANES>, TILE_ROWS> all_tiles(std::integer_sequence<int, R...>) {
    return {tiles_of<T, R + 1>(std::make_integer_sequence<int, TILE_LANES>{})...};
}

// Indexed by rows - 1 and registers - 1.
template <class T>
constexpr auto TILES = all_tiles<T>(std::make_integer_sequence<int, TILE_ROWS>{});

template <class T>
INLINE void run_tile(Share row, Share lane, const bf16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t inner,
                     T* c, int64_t c_stride, const T* plus) {
    TILES<T>[static_cast<size_t>(row.last - row.first - 1)][static_cast<size_t>(lane.last - lane.first - 1)](
        a, a_stride, b, b_stride, inner, c, c_stride, plus);
}

// c[rows, columns] = a b, or plus + a b, with a [rows, inner] and pairs b [inner / 2, columns], the last filled up with zeros
// if `inner` is odd; `columns` is a multiple of a register. Rows of c may be closer than `columns`: the last columns of a row
// are written first, and what they write over the next row is then overwritten.
template <class T>
inline void multiply(const bf16* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride, int64_t columns,
                     int64_t inner, T* c, int64_t c_stride, const T* plus = nullptr) {
#ifdef HAS_TILES
    multiply_in_tiles(a, a_stride, rows, b, b_stride, columns, inner, c, c_stride, plus);
#else
    // Tiles of about the same size: a small one at the end would be bound by the latency of its additions.
    const int64_t lanes = columns / LANE, across = (lanes + TILE_LANES - 1) / TILE_LANES;
    const int64_t down = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const auto row_of = [=](int64_t y) { return share(rows, static_cast<int>(y), static_cast<int>(down)); };
    const auto lane_of = [=](int64_t x) { return share(lanes, static_cast<int>(x), static_cast<int>(across)); };
    for (int64_t x = across; x-- > 0;) {
        const Share lane = lane_of(x);
        for (int64_t y = 0; y < down; ++y) {
            const Share row = row_of(y);
            const int64_t at = row.first * c_stride + lane.first * LANE;
            run_tile(row, lane, a + row.first * a_stride, a_stride, b + lane.first * LANE, b_stride, inner, c + at, c_stride,
                     plus ? plus + at : nullptr);
        }
    }
#endif
}

// Transposes a matrix of 32-bit numbers: out[j, i] = in[i, j]. A row has `halves` 16-bit numbers; the last 32-bit number is
// filled up with zeros, and so are the columns of `out` from `rows` to the next whole register. `in_stride` counts halves.
inline void transposed(const void* in, int64_t in_stride, int64_t rows, int64_t halves, uint32_t* out, int64_t out_stride) {
    const uint16_t* from = static_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < rows; i += LANE) {
        for (int64_t j = 0; 2 * j < halves; j += LANE) {
            const uint16_t* block = from + i * in_stride + 2 * j;
            uint32_t* to = out + j * out_stride + i;
            Bits r[LANE];
            if (rows - i >= LANE && halves - 2 * j >= 2 * LANE) {
#pragma GCC unroll 16
                for (int k = 0; k < LANE; ++k) r[k] = load_bits(block + k * in_stride);
                transpose(r);
#pragma GCC unroll 16
                for (int k = 0; k < LANE; ++k) store_bits(to + k * out_stride, r[k]);
                continue;
            }
            for (int k = 0; k < LANE; ++k) r[k] = load_some(block + k * in_stride, i + k < rows ? halves - 2 * j : 0);
            transpose(r);
            for (int k = 0; k < LANE && 2 * (j + k) < halves; ++k) store_bits(to + k * out_stride, r[k]);
        }
    }
}

// x^T as pairs along the columns of x, [width / 2, rows]; x is bf16 [rows, width].
inline void pairs_of_columns(const bf16* x, int64_t stride, int64_t rows, int64_t width, uint32_t* out, int64_t out_stride) {
    transposed(x, stride, rows, width, out, out_stride);
}

// x as pairs along its rows, [pairs, width]; x is bf16 [rows, width]. Zeros follow its rows, and its columns up to the next
// whole register, which is the stride of `out`.
inline void pairs_of_rows(const bf16* x, int64_t stride, int64_t rows, int64_t width, int64_t pairs, uint32_t* out) {
    const int64_t out_stride = whole_lanes(width), full = width / LANE * LANE;
    for (int64_t i = 0; i < pairs; ++i) {
        const bf16* row = x + 2 * i * stride;
        uint32_t* to = out + i * out_stride;
        const bool has_low = 2 * i < rows, has_high = 2 * i + 1 < rows;
        if (has_high) {
            for (int64_t j = 0; j < full; j += LANE) store_bits(to + j, paired(spread(row + j), spread(row + stride + j)));
        }
        for (int64_t j = has_high ? full : 0; j < width; j += LANE) {
            const Bits low = spread_some(row + j, has_low ? width - j : 0);
            store_bits(to + j, paired(low, spread_some(row + stride + j, has_high ? width - j : 0)));
        }
    }
}

// Copies past the caches, which would read a line before they write it.
inline void stream(const bf16* from, bf16* to, int64_t count) {
    const int64_t before = std::min(count, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64 / 2));
    std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(before) * sizeof(bf16));
    int64_t i = before;
    for (; i + LINE <= count; i += LINE) {
        for (int64_t j = i; j < i + LINE; j += 2 * LANE) stream_bits(to + j, load_bits(from + j));
    }
    std::memcpy(static_cast<void*>(to + i), from + i, static_cast<size_t>(count - i) * sizeof(bf16));
}

}  // namespace

#endif
