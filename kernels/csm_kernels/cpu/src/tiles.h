// Products of bf16 matrices in tiles (AMX): 16 rows of 64 bytes. One instruction adds 32 products to each of 16 x 16 sums.
//
// A block of the result, up to 32 x 32, is four tiles of sums. For each step of 32 along the inner dimension it reads two
// tiles of the left matrix, whose rows lie as in memory, and two of the right matrix, which is stored as pairs (products.h).

#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

#ifdef HAS_PRODUCTS

namespace {

#ifdef HAS_TILES

constexpr int64_t TILE = 16;              // rows of a tile, and 32-bit numbers of a row
constexpr int64_t BLOCK_SIDE = 2 * TILE;  // rows and columns of a block of sums, and the depth of a step
constexpr int64_t HIGH = 128;             // rows of the left matrix that are multiplied by one strip of columns
constexpr int64_t DEPTH = 512;            // rows of that strip: the first-level cache holds them beside the sums

// Palette 1 of LDTILECFG.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// The configuration of this thread's tiles; 0: none.
thread_local int64_t tiles_shaped = 0;

// Exists in every thread while it multiplies. Other libraries may configure its tiles before and afterwards.
struct Tiles {
    Tiles() { tiles_shaped = 0; }
    ~Tiles() {
        if (tiles_shaped) _tile_release();
    }
};

// Keeps the compiler from moving stores past the tile instructions, whose operands do not show that they read memory.
INLINE void written() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums [2, 2], 4 and 5 the left matrix, 6 and 7 the right one.
inline void shape_tiles(int64_t rows) {
    const int64_t low = std::min(rows, TILE), high = rows > TILE ? rows - TILE : TILE, wanted = low * (TILE + 1) + high;
    if (wanted == tiles_shaped) return;
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = TILE;
    for (int i : {0, 1, 4}) shapes.rows[i] = static_cast<uint8_t>(low);
    for (int i : {2, 3, 5}) shapes.rows[i] = static_cast<uint8_t>(high);
    written();
    _tile_loadconfig(&shapes);
    tiles_shaped = wanted;
}

// Strides of tiles are bytes. All loads come before the products: if another thread of the core multiplies as well, as on
// rented machines, a step then takes 85 ns instead of 104, and otherwise as long. A right matrix in the second-level cache
// (IN_SECOND) is loaded past the first-level cache (TILELOADDT1), where the left matrix stays.
template <int I, int J, bool IN_SECOND>
INLINE void add_step(const bf16* a, int64_t a_bytes, const uint32_t* b, int64_t b_bytes) {
    if constexpr (IN_SECOND) {
        _tile_stream_loadd(6, b, b_bytes);
        if constexpr (J == 2) _tile_stream_loadd(7, b + TILE, b_bytes);
    } else {
        _tile_loadd(6, b, b_bytes);
        if constexpr (J == 2) _tile_loadd(7, b + TILE, b_bytes);
    }
    _tile_loadd(4, a, a_bytes);
    if constexpr (I == 2) _tile_loadd(5, a + TILE * a_bytes / 2, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (J == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (I == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (I == 2 && J == 2) _tile_dpbf16ps(3, 5, 7);
}

// Rows of sums, as wide as a block or half of it, that are not yet rounded and written. Each step of the next block writes a
// few of them, and does not wait for it.
struct Unwritten {
    const float* sums;  // rows BLOCK_SIDE apart
    int64_t rows, columns;
    bf16* to;
    int64_t stride;  // of `to` and `plus`
    const bf16* plus;
    bool is_aligned;  // rows are whole cache lines, and are written past the caches

    INLINE void write(int64_t count) {
        for (count = std::min(count, rows), rows -= count; count > 0; --count, sums += BLOCK_SIDE, to += stride) {
            Floats low = load(sums);
            if (columns == BLOCK_SIDE) {
                Floats high = load(sums + TILE);
                if (plus) low += load(plus), high += load(plus + TILE);
                if (is_aligned) {
                    stream_lanes(to, low, high);
                } else {
                    put_lanes(to, low, high);
                }
            } else {
                put_lane(to, plus ? low + load(plus) : low);
            }
            if (plus) plus += stride;
        }
    }
};

// Both matrices, and the part of the inner dimension after its last whole step, filled up with zeros, in rows of 64 and 128
// bytes.
struct Operands {
    const bf16 *a, *a_rest;
    const uint32_t *b, *b_rest;
    int64_t a_stride, b_stride, steps;
    bool has_rest;
};

// sums [I tiles, J tiles] = from + a b, or a b if `from` is null. The rows of both are `stride` floats apart. Unwritten rows
// (`before`) are written before the sums are stored, so they may lie in the same memory.
template <int I, int J, bool IN_SECOND>
inline __attribute__((noinline)) void block(const Operands& x, float* sums, const float* from, int64_t stride,
                                            Unwritten& before) {
    const int64_t bytes = stride * 4, a_bytes = x.a_stride * 2, b_bytes = x.b_stride * 4;
    const int64_t each = x.steps ? (before.rows + x.steps - 1) / x.steps : 0;
    written();
    if (from) {
        _tile_loadd(0, from, bytes);
        if constexpr (J == 2) _tile_loadd(1, from + TILE, bytes);
        if constexpr (I == 2) _tile_loadd(2, from + TILE * stride, bytes);
        if constexpr (I == 2 && J == 2) _tile_loadd(3, from + TILE * stride + TILE, bytes);
    } else {
        _tile_zero(0);
        if constexpr (J == 2) _tile_zero(1);
        if constexpr (I == 2) _tile_zero(2);
        if constexpr (I == 2 && J == 2) _tile_zero(3);
    }
    for (int64_t i = 0; i < x.steps; ++i) {
        add_step<I, J, IN_SECOND>(x.a + i * BLOCK_SIDE, a_bytes, x.b + i * TILE * x.b_stride, b_bytes);
        if constexpr (IN_SECOND) before.write(each);
    }
    if (x.has_rest) add_step<I, J, false>(x.a_rest, BLOCK_SIDE * 2, x.b_rest, BLOCK_SIDE * 4);
    if constexpr (IN_SECOND) before.write(before.rows);
    // The last columns of a row first.
    if constexpr (J == 2) _tile_stored(1, sums + TILE, bytes);
    if constexpr (I == 2 && J == 2) _tile_stored(3, sums + TILE * stride + TILE, bytes);
    _tile_stored(0, sums, bytes);
    if constexpr (I == 2) _tile_stored(2, sums + TILE * stride, bytes);
}

template <bool IN_SECOND>
inline void run_block(int64_t rows, int64_t columns, const Operands& x, float* sums, const float* from, int64_t stride,
                      Unwritten& before) {
    shape_tiles(rows);
    if (rows > TILE) {
        columns > TILE ? block<2, 2, IN_SECOND>(x, sums, from, stride, before)
                       : block<2, 1, IN_SECOND>(x, sums, from, stride, before);
    } else {
        columns > TILE ? block<1, 2, IN_SECOND>(x, sums, from, stride, before)
                       : block<1, 1, IN_SECOND>(x, sums, from, stride, before);
    }
}

// Copies the last pairs of the right matrix, `rest` numbers of the inner dimension (0: nothing), as a step filled up with
// zeros.
inline void copy_rest(const uint32_t* from, int64_t stride, int64_t rest, int64_t width, uint32_t* to) {
    for (int64_t i = 0; rest && i < TILE; ++i) {
        for (int64_t j = 0; j < width; j += TILE) {
            store_bits(to + i * BLOCK_SIDE + j, 2 * i < rest ? load_bits(from + i * stride + j) : Bits{});
        }
    }
}

// `multiply` of products.h. The thread must have `Tiles`.
template <class T>
inline void multiply_in_tiles(const bf16* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride,
                              int64_t columns, int64_t inner, T* c, int64_t c_stride, const T* plus) {
    alignas(64) float sums[HIGH * BLOCK_SIDE];
    alignas(64) bf16 a_rest[HIGH * BLOCK_SIDE];
    alignas(64) uint32_t b_rest[TILE * BLOCK_SIDE];
    const int64_t whole = inner / BLOCK_SIDE * BLOCK_SIDE, rest = inner - whole;
    Unwritten before = {};
    for (int64_t top = 0; top < rows; top += HIGH) {
        const int64_t count = std::min(HIGH, rows - top);
        const bf16* left = a + top * a_stride;
        for (int64_t i = 0; rest && i < count; ++i) {
            store_bits(a_rest + i * BLOCK_SIDE, load_some(left + i * a_stride + whole, rest));
        }
        for (int64_t last = columns, width; last > 0; last -= width) {
            width = last % BLOCK_SIDE ? TILE : BLOCK_SIDE;
            const int64_t column = last - width;
            copy_rest(b + whole / 2 * b_stride + column, b_stride, rest, width, b_rest);
            for (int64_t k = 0; k < inner; k += DEPTH) {
                const bool is_last = k + DEPTH >= inner;
                for (int64_t row = 0; row < count; row += BLOCK_SIDE) {
                    const int64_t some = std::min(BLOCK_SIDE, count - row), at = (top + row) * c_stride + column;
                    const Operands x{left + row * a_stride + k, a_rest + row * BLOCK_SIDE, b + k / 2 * b_stride + column, b_rest,
                                     a_stride, b_stride, (std::min(whole, k + DEPTH) - k) / BLOCK_SIDE, is_last && rest};
                    if constexpr (std::is_same<T, float>::value) {
                        run_block<false>(some, width, x, c + at, k ? c + at : plus ? plus + at : nullptr, c_stride, before);
                    } else {
                        float* to = inner > DEPTH ? sums + row * BLOCK_SIDE : sums;
                        run_block<false>(some, width, x, to, k ? to : nullptr, BLOCK_SIDE, before);
                        if (!is_last) continue;
                        before = {to, some, width, c + at, c_stride, plus ? plus + at : nullptr, false};
                        before.write(some);  // now: beside the next products, the heads took a fifth longer
                    }
                }
            }
        }
    }
}

// The same for a right matrix of many columns in the second-level cache, stored in strips of 32 columns, `strip_size` apart:
// each is [inner / 2, 32] pairs, the last one may have 16 columns. Up to 32 rows of the left matrix are multiplied by all
// strips before the next rows, so they stay in the first-level cache if they are short enough, and the strips bypass it.
// `is_aligned`: the columns of c are whole cache lines, and are written past the caches. The thread must have `Tiles`.
template <class T>
inline void multiply_strips(const bf16* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t strip_size,
                            int64_t columns, int64_t inner, T* c, int64_t c_stride, const T* plus,
                            bool is_aligned = false) {
    alignas(64) float sums[BLOCK_SIDE * BLOCK_SIDE];
    alignas(64) bf16 a_rest[BLOCK_SIDE * BLOCK_SIDE];
    alignas(64) uint32_t b_rest[TILE * BLOCK_SIDE];
    const int64_t whole = inner / BLOCK_SIDE * BLOCK_SIDE, rest = inner - whole;
    Unwritten before = {};
    for (int64_t top = 0; top < rows; top += BLOCK_SIDE) {
        const int64_t count = std::min(BLOCK_SIDE, rows - top);
        const bf16* left = a + top * a_stride;
        for (int64_t i = 0; rest && i < count; ++i) {
            store_bits(a_rest + i * BLOCK_SIDE, load_some(left + i * a_stride + whole, rest));
        }
        for (int64_t column = 0; column < columns; column += BLOCK_SIDE) {
            const int64_t width = std::min(BLOCK_SIDE, columns - column), at = top * c_stride + column;
            const uint32_t* right = b + column / BLOCK_SIDE * strip_size;
            copy_rest(right + whole / 2 * width, width, rest, width, b_rest);
            const Operands x{left, a_rest, right, b_rest, a_stride, width, whole / BLOCK_SIDE, rest > 0};
            const T* added = plus ? plus + at : nullptr;
            if constexpr (std::is_same<T, float>::value) {
                run_block<true>(count, width, x, c + at, added, c_stride, before);
            } else {
                run_block<true>(count, width, x, sums, nullptr, BLOCK_SIDE, before);
                before = {sums, count, width, c + at, c_stride, added, is_aligned};
            }
        }
    }
    before.write(before.rows);
}

#else

struct Tiles {};

#endif

}  // namespace

#endif
