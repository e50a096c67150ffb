// Moments of AdamW in 8 bits: what codes stand for, and the codes nearest to numbers. cpu_adamw.py says where the values come
// from and how its tables are made.

#pragma once

#include "common.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define LOOKS_UP_IN_REGISTERS 1
#endif

namespace {

constexpr int64_t QUANTIZED = 256;  // numbers that share a scale, a block

constexpr int32_t LOW = (127 - 24) << 7, PREFIXES = (24 << 7) + 1;  // of magnitudes from 2^-24 to 1

#ifdef LOOKS_UP_IN_REGISTERS

// `16 REGISTERS` numbers in registers. Compilers look up one by one in memory, and so do some processors that are asked to
// gather.
template <int REGISTERS>
class Row {
  public:
    explicit INLINE Row(const float* from) {
#pragma GCC unroll 16
        for (int i = 0; i < REGISTERS; ++i) part[i] = (__m512)load(from + LANES * i);
    }

    INLINE __m512 at(__m512i index) const {
        if constexpr (REGISTERS == 1) {
            return _mm512_permutexvar_ps(index, part[0]);
        } else {
            __m512 out[REGISTERS / 2];
#pragma GCC unroll 8
            for (int i = 0; i < REGISTERS / 2; ++i) out[i] = _mm512_permutex2var_ps(part[2 * i], index, part[2 * i + 1]);
            int32_t bit = 2 * LANES;  // that tells which of two is meant
#pragma GCC unroll 3
            for (int left = REGISTERS / 4; left; left /= 2, bit *= 2) {
                const __mmask16 second = _mm512_test_epi32_mask(index, _mm512_set1_epi32(bit));
#pragma GCC unroll 4
                for (int i = 0; i < left; ++i) out[i] = _mm512_mask_mov_ps(out[2 * i], second, out[2 * i + 1]);
            }
            return out[0];
        }
    }

  private:
    __m512 part[REGISTERS];
};

// The codes of 256 ascending values.
class Codes {
  public:
    Codes(const float* values_, const int32_t*, const float*) : map(values_) {
        // Level n of the search asks whether a number lies above one of 2^n borders.
        float* level = levels;
        for (int borders = 1; borders < 256; borders *= 2) {
            const int room = borders < LANES ? LANES : borders, apart = 256 / borders;
            for (int i = 0; i < room; ++i) {
                const int below = i % borders * apart + apart / 2 - 1;
                level[i] = static_cast<float>((static_cast<double>(map[below]) + map[below + 1]) / 2);
            }
            level += room;
        }
    }

    // What a block's codes stand for.
    INLINE void values(const uint8_t* codes, float scale, float* out) const {
        const Row<256 / LANES> row(map);
        for (int64_t i = 0; i < QUANTIZED; i += LANES) {
            const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
            store(out + i, (Floats)row.at(code) * scale);
        }
    }

    // The codes of what is nearest to the quotients of a block's numbers, from `least` on.
    INLINE void nearest(const float* x, float by, int32_t least, uint8_t* codes) const {
        const float* from = levels;
        const Row<1> first(from), second(from + LANES), third(from + 2 * LANES), fourth(from + 3 * LANES),
            fifth(from + 4 * LANES);
        const Row<2> sixth(from + 5 * LANES);
        const Row<4> seventh(from + 7 * LANES);
        const Row<8> eighth(from + 11 * LANES);
        for (int64_t i = 0; i < QUANTIZED; i += LANES) {
            const __m512 quotient = (__m512)(load(x + i) / by);
            __m512i code = _mm512_setzero_si512();
            code = after(code, quotient, first);
            code = after(code, quotient, second);
            code = after(code, quotient, third);
            code = after(code, quotient, fourth);
            code = after(code, quotient, fifth);
            code = after(code, quotient, sixth);
            code = after(code, quotient, seventh);
            code = after(code, quotient, eighth);
            code = _mm512_max_epi32(code, _mm512_set1_epi32(least));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
        }
    }

  private:
    // The code's next binary digit.
    template <int REGISTERS>
    static INLINE __m512i after(__m512i code, __m512 x, const Row<REGISTERS>& borders) {
        const __m512i twice = _mm512_add_epi32(code, code);
        const __mmask16 above = _mm512_cmp_ps_mask(x, borders.at(code), _CMP_GT_OQ);
        return _mm512_mask_add_epi32(twice, above, twice, _mm512_set1_epi32(1));
    }

    const float* const map;
    float levels[19 * LANES];
};

#else

// The same. Of numbers whose magnitude begins with the same 16 bits, those above the bound have the code after the other ones'
// (`code_table` in cpu_adamw.py).
class Codes {
  public:
    Codes(const float* values_, const int32_t* first_codes_, const float* bounds_)
        : map(values_), first_codes(first_codes_), bounds(bounds_) {}

    INLINE void values(const uint8_t* codes, float scale, float* out) const {
#pragma omp simd
        for (int64_t i = 0; i < QUANTIZED; ++i) out[i] = map[codes[i]] * scale;
    }

    INLINE void nearest(const float* x, float by, int32_t least, uint8_t* codes) const {
#pragma omp simd
        for (int64_t i = 0; i < QUANTIZED; ++i) {
            const float within = x[i] / by;
            int32_t bits;
            std::memcpy(&bits, &within, sizeof bits);
            const int32_t prefix = (bits & 0x7FFFFFFF) >> 16;
            int32_t place = (prefix < LOW ? LOW : prefix) - LOW;
            place = place < PREFIXES ? place : PREFIXES - 1;  // NaN, which nobody's moments are
            place += bits < 0 ? PREFIXES : 0;
            const int32_t code = first_codes[place] + (within > bounds[place]);
            codes[i] = static_cast<uint8_t>(code > least ? code : least);
        }
    }

  private:
    const float* const map;
    const int32_t* const first_codes;
    const float* const bounds;
};

#endif

// A moment: codes, and a scale for each QUANTIZED of them.
struct Eighths {
    uint8_t* codes;
    float* scales;
    const Codes* meaning;
    int32_t least;  // code; that of zero is no second moment's (csm_fast/adamw.py)
};

// A block, the last of a parameter may be short. `out` has room for a whole one and is filled.
INLINE void widen(const Eighths& e, int64_t at, int64_t count, float* out) {
    uint8_t room[QUANTIZED] = {};
    const uint8_t* codes = e.codes + at;
    if (count < QUANTIZED) codes = static_cast<const uint8_t*>(std::memcpy(room, codes, static_cast<size_t>(count)));
    e.meaning->values(codes, e.scales[at / QUANTIZED], out);
}

INLINE void narrow(const Eighths& e, int64_t at, int64_t count, const float* x) {
    float highest = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; ++i) {
        const float size = __builtin_fabsf(x[i]);
        highest = size > highest ? size : highest;
    }
    e.scales[at / QUANTIZED] = highest;
    const float by = highest > 0.0f ? highest : 1.0f;
    uint8_t room[QUANTIZED];
    e.meaning->nearest(x, by, e.least, count < QUANTIZED ? room : e.codes + at);
    if (count < QUANTIZED) std::memcpy(e.codes + at, room, static_cast<size_t>(count));
}

}  // namespace
