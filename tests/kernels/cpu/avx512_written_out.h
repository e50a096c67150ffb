// The AVX-512 instructions that the library uses, emulated in C++. `CXX="g++ -include <this file>"` builds the form for
// processors with AVX512-BF16 on a processor that has AVX2, for tests. It is thirty times as slow. The emulation does not flush
// denormal numbers, and rounds twice where an instruction rounds once.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#error "this processor has them"
#endif
#define __AVX512F__ 1
#define __AVX512BF16__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1

namespace written_out {

template <class T, int N>
struct Numbers {
    T at[N];
};
typedef Numbers<uint16_t, 32> Halves32;
typedef Numbers<uint16_t, 16> Halves16;
typedef Numbers<uint32_t, 16> Words16;
typedef Numbers<uint64_t, 8> Longs;
typedef Numbers<float, 16> Floats16;

template <class A, class B>
inline A as(B from) {
    static_assert(sizeof(A) == sizeof(B), "");
    A to;
    std::memcpy(static_cast<void*>(&to), &from, sizeof to);
    return to;
}

// f of every number of registers.
template <class To, class Of, class F, class... Registers>
inline To each(F f, Registers... registers) {
    Of out;
    int i = 0;
    for (auto& x : out.at) x = f(as<Of>(registers).at[i]...), ++i;
    return as<To>(out);
}

inline __m512i load(const void* from) {
    __m512i out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline void store(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }

inline void stream(void* to, __m512i x) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof x) __builtin_trap();
    store(to, x);
}

template <class To, class Of>
inline To load_masked(uint32_t mask, const void* from) {
    Of out = {};
    int i = 0;
    for (auto& x : out.at) {
        if (mask >> i & 1) x = static_cast<const uint16_t*>(from)[i];
        ++i;
    }
    return as<To>(out);
}

inline __m512i spread(__m256i x) {
    Words16 out;
    for (int i = 0; i < 16; ++i) out.at[i] = as<Halves16>(x).at[i];
    return as<__m512i>(out);
}

inline __m512i or_(__m512i a, __m512i b) {
    return each<__m512i, Words16>([](uint32_t x, uint32_t y) { return x | y; }, a, b);
}

inline __m512i shifted(__m512i a, int n) {
    return each<__m512i, Words16>([=](uint32_t x) { return x << n; }, a);
}

// The lower (0) or higher (1) halves of both operands' quarters, in turns.
template <class Of, int HALF>
inline __m512i unpacked(__m512i a, __m512i b) {
    const Of x = as<Of>(a), y = as<Of>(b);
    Of out;
    const int quarter = static_cast<int>(sizeof x.at / sizeof x.at[0]) / 4;
    for (int q = 0; q < 4 * quarter; q += quarter) {
        for (int i = 0; i < quarter / 2; ++i) {
            out.at[q + 2 * i] = x.at[q + HALF * quarter / 2 + i];
            out.at[q + 2 * i + 1] = y.at[q + HALF * quarter / 2 + i];
        }
    }
    return as<__m512i>(out);
}

inline __m512i shuffled(__m512i a, __m512i b, int which) {
    Words16 out;
    for (int q = 0; q < 4; ++q) {
        const Words16 from = as<Words16>(q < 2 ? a : b);
        for (int i = 0; i < 4; ++i) out.at[4 * q + i] = from.at[4 * (which >> (2 * q) & 3) + i];
    }
    return as<__m512i>(out);
}

template <class... Integers>
inline __m512i numbers(Integers... from_the_last) {
    const int given[16] = {from_the_last...};
    Words16 out;
    for (int i = 0; i < 16; ++i) out.at[i] = static_cast<uint32_t>(given[15 - i]);
    return as<__m512i>(out);
}

inline __m512i all(int x) {
    return each<__m512i, Words16>([=](uint32_t) { return static_cast<uint32_t>(x); }, __m512i{});
}

inline __m512 permuted(__m512i which, __m512 a) {
    Floats16 out;
    for (int i = 0; i < 16; ++i) out.at[i] = as<Floats16>(a).at[as<Words16>(which).at[i] % 16];
    return as<__m512>(out);
}

inline __m512 permuted_in_quarters(__m512 a, int which) {
    Floats16 out;
    for (int i = 0; i < 16; ++i) out.at[i] = as<Floats16>(a).at[i / 4 * 4 + (which >> (2 * (i % 4)) & 3)];
    return as<__m512>(out);
}

inline __m512 widened(__m256 a) {
    Floats16 out;
    for (auto& x : out.at) x = NAN;  // the upper half is undefined
    std::memcpy(static_cast<void*>(&out), &a, sizeof a);
    return as<__m512>(out);
}

inline __m512 difference(__m512 other, uint32_t mask, __m512 a, __m512 b) {
    Floats16 out = as<Floats16>(other);
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) out.at[i] = as<Floats16>(a).at[i] - as<Floats16>(b).at[i];
    }
    return as<__m512>(out);
}

inline __m512 moved(__m512 other, uint32_t mask, __m512 a) {
    Floats16 out = as<Floats16>(other);
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) out.at[i] = as<Floats16>(a).at[i];
    }
    return as<__m512>(out);
}

inline uint16_t less(__m512i a, __m512i b) {
    int mask = 0;
    for (int i = 0; i < 16; ++i) mask |= (static_cast<int32_t>(as<Words16>(a).at[i]) < static_cast<int32_t>(as<Words16>(b).at[i])) << i;
    return static_cast<uint16_t>(mask);
}

inline uint16_t greater(__m512 a, __m512 b, int) {
    int mask = 0;
    for (int i = 0; i < 16; ++i) mask |= (as<Floats16>(a).at[i] > as<Floats16>(b).at[i]) << i;
    return static_cast<uint16_t>(mask);
}

inline __m256i narrowed(__m512 a) {
    Halves16 out;
    for (int i = 0; i < 16; ++i) {
        const float x = as<Floats16>(a).at[i];
        const uint32_t bits = as<uint32_t>(x);
        out.at[i] = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    return as<__m256i>(out);
}

// The second one's numbers first.
inline __m512i narrowed_together(__m512 high, __m512 low) {
    const __m256i halves[2] = {narrowed(low), narrowed(high)};
    return load(halves);
}

inline __m512 pairs_added(__m512 sum, __m512i a, __m512i b) {
    Floats16 out = as<Floats16>(sum);
    for (int i = 0; i < 16; ++i) {
        const uint32_t x = as<Words16>(a).at[i], y = as<Words16>(b).at[i];
        out.at[i] += as<float>(x & 0xffff0000u) * as<float>(y & 0xffff0000u);
        out.at[i] += as<float>(x << 16) * as<float>(y << 16);
    }
    return as<__m512>(out);
}

}  // namespace written_out

#define __m512bh __m512i
#define _mm512_loadu_si512 written_out::load
#define _mm512_storeu_si512 written_out::store
#define _mm512_stream_si512 written_out::stream
#define _mm512_maskz_loadu_epi16 written_out::load_masked<__m512i, written_out::Halves32>
#define _mm256_maskz_loadu_epi16 written_out::load_masked<__m256i, written_out::Halves16>
#define _mm512_cvtepu16_epi32 written_out::spread
#define _mm512_or_si512 written_out::or_
#define _mm512_slli_epi32 written_out::shifted
#define _mm512_unpacklo_epi16 written_out::unpacked<written_out::Halves32, 0>
#define _mm512_unpackhi_epi16 written_out::unpacked<written_out::Halves32, 1>
#define _mm512_unpacklo_epi32 written_out::unpacked<written_out::Words16, 0>
#define _mm512_unpackhi_epi32 written_out::unpacked<written_out::Words16, 1>
#define _mm512_unpacklo_epi64 written_out::unpacked<written_out::Longs, 0>
#define _mm512_unpackhi_epi64 written_out::unpacked<written_out::Longs, 1>
#define _mm512_shuffle_i32x4 written_out::shuffled
#define _mm512_set_epi32 written_out::numbers
#define _mm512_set1_epi32 written_out::all
#define _mm512_permutexvar_ps written_out::permuted
#define _mm512_permute_ps written_out::permuted_in_quarters
#define _mm512_castps256_ps512 written_out::widened
#define _mm512_setzero_ps() __m512{}
#define _mm512_mask_sub_ps written_out::difference
#define _mm512_mask_mov_ps written_out::moved
#define _mm512_cmplt_epi32_mask written_out::less
#define _mm512_cmp_ps_mask written_out::greater
#define _mm512_cvtneps_pbh written_out::narrowed
#define _mm512_cvtne2ps_pbh written_out::narrowed_together
#define _mm512_dpbf16_ps written_out::pairs_added
