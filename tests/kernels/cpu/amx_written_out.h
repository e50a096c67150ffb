// The instructions for tiles (AMX) that the library's products use, emulated in C++. `CXX="g++ -DMAY_USE_TILES -include <this
// file>"` builds the form for processors with tiles; without AVX-512, avx512_written_out.h must come first. The emulation does
// not flush denormal numbers.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__AMX_TILE__)
#error "this processor has them"
#endif
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1

namespace tiles_written_out {

struct Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

inline thread_local Shapes shapes;  // palette 0: not to be used
inline thread_local unsigned char tiles[8][16][64];

inline void check(bool right) {
    if (!right) __builtin_trap();
}

inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

inline void load_shapes(const void* from) {
    std::memcpy(&shapes, from, sizeof shapes);
    check(shapes.palette == 1 && shapes.start_row == 0);
    for (unsigned char x : shapes.reserved) check(x == 0);
    for (int tile = 0; tile < 16; ++tile) {
        check(tile < 8 ? shapes.rows[tile] <= 16 && shapes.row_bytes[tile] <= 64 : !shapes.rows[tile] && !shapes.row_bytes[tile]);
        if (tile < 8) zero(tile);
    }
}

inline void release() { shapes.palette = 0; }

inline void load(int tile, const void* from, int64_t stride) {
    check(shapes.palette == 1);
    zero(tile);
    for (int row = 0; row < shapes.rows[tile]; ++row) {
        std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, shapes.row_bytes[tile]);
    }
}

inline void store(int tile, void* to, int64_t stride) {
    check(shapes.palette == 1);
    for (int row = 0; row < shapes.rows[tile]; ++row) {
        std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], shapes.row_bytes[tile]);
    }
}

inline float half(const unsigned char* at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    const uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &whole, sizeof out);
    return out;
}

inline void add_products(int sums, int a, int b) {
    check(shapes.palette == 1 && shapes.rows[a] == shapes.rows[sums] && shapes.rows[b] * 4 == shapes.row_bytes[a]);
    check(shapes.row_bytes[b] == shapes.row_bytes[sums]);
    float right[2][16][16];
    for (int pair = 0; pair < shapes.rows[b]; ++pair) {
        for (int j = 0; j < 16; ++j) {
            for (int odd = 0; odd < 2; ++odd) right[odd][pair][j] = half(tiles[b][pair] + 4 * j + 2 * odd);
        }
    }
    for (int row = 0; row < shapes.rows[sums]; ++row) {
        float sum[16];
        std::memcpy(sum, tiles[sums][row], sizeof sum);
        for (int pair = 0; pair < shapes.rows[b]; ++pair) {
            for (int odd = 0; odd < 2; ++odd) {
                const float left = half(tiles[a][row] + 4 * pair + 2 * odd);
                for (int j = 0; j < 16; ++j) sum[j] += left * right[odd][pair][j];
            }
        }
        std::memcpy(tiles[sums][row], sum, shapes.row_bytes[sums]);
    }
}

}  // namespace tiles_written_out

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles_written_out::load_shapes
#define _tile_release tiles_written_out::release
#define _tile_loadd tiles_written_out::load
#define _tile_stream_loadd tiles_written_out::load
#define _tile_stored tiles_written_out::store
#define _tile_zero tiles_written_out::zero
#define _tile_dpbf16ps tiles_written_out::add_products
