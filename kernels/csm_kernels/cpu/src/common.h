// Shared by the sources of the CPU library: bf16, registers of floats, e^x, threads.
//
// Values are float32 or bf16 in memory and float32 in registers. Nothing here includes PyTorch's headers, so the library
// builds in a few seconds and works with every version of PyTorch.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }

inline float wide(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void put(float& to, float x) { to = x; }

// To nearest, ties to even; NaN stays NaN.
inline void put(bf16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

template <class T>
inline float rounded(float x) {
    T stored;
    put(stored, x);
    return wide(stored);
}

// Registers of floats, as vector types of the compiler.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

#define INLINE inline __attribute__((always_inline))

INLINE int32_t whole_of(float x) { return static_cast<int32_t>(x); }
INLINE Ints whole_of(Floats x) { return __builtin_convertvector(x, Ints); }
INLINE float as_float(int32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
INLINE Floats as_float(Ints bits) { return reinterpret_cast<Floats>(bits); }

// e^x of a float or a register of floats, with an error of 2 ulp: 2^n times a polynomial over [-ln(2)/2, ln(2)/2] (expf of
// Cephes). Below -87 the result is the smallest normal number, above 88.7 it is infinite.
template <class F>
INLINE F exponential(F x) {
    const F most = F{} + 88.8f, least = F{} - 87.3f;
    const F high = x > most ? most : x;
    const F within = high < least ? least : high;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const F n = (within * 1.44269504f + shift) - shift;
    F f = within - n * 0.693359375f;
    f -= n * -2.12194440e-4f;
    F p = F{} + 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    // In two factors, because float32 cannot hold 2^128.
    const auto whole = whole_of(n);
    const auto half = whole >> 1;
    return p * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
}

// The items [first, last) of a thread.
struct Share {
    int64_t first, last;
};

inline Share share(int64_t items, int part, int parts) {
    return {items * part / parts, items * (part + 1) / parts};
}

// Not inlined, so that one and several threads run the same machine code. The compiler could fuse multiplications and
// additions of two copies in different ways, and results would depend on the number of threads.
template <class Body>
__attribute__((noinline)) void run_share(const Body& body, int thread, int64_t first, int64_t last) {
    body(thread, first, last);
}

// Calls body(thread, first, last) for the share of each thread in `items`.
template <class Body>
void parallel(int64_t items, int threads, Body body) {
    if (threads <= 1) {
        run_share(body, 0, int64_t{0}, items);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const Share mine = share(items, thread, threads);
        run_share(body, thread, mine.first, mine.last);
    }
}

INLINE Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

INLINE Floats load(const bf16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

INLINE void store(bf16* to, Floats x) {
    const Words bits = reinterpret_cast<Words>(x);
    const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words nan = Words{} + 0x7fc0;
    const Halves out = __builtin_convertvector(x != x ? nan : nearest, Halves);
    std::memcpy(static_cast<void*>(to), &out, sizeof out);
}

INLINE float highest_of(Floats x) {
    float out = x[0];
#pragma omp simd reduction(max : out)
    for (int i = 0; i < LANES; ++i) out = x[i] > out ? x[i] : out;
    return out;
}

INLINE float sum_of(Floats x) {
    float out = 0.0f;
#pragma omp simd reduction(+ : out)
    for (int i = 0; i < LANES; ++i) out += x[i];
    return out;
}

// Memory for `width` floats, rounded up to whole registers.
class Buffer {
  public:
    explicit Buffer(int64_t width)
        : data(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(width / 64 + 2) * 64 * sizeof(float)))) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    float* const data;
};

template <class T>
INLINE void clear(T* to, int64_t count) {
    if (count > 0) std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(T));
}

// Hands out a thread's memory piece by piece, each on cache lines of its own. Constructed from null, it only counts.
class Scratch {
  public:
    explicit Scratch(void* data_) : data(static_cast<char*>(data_)) {}

    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* out = data ? reinterpret_cast<T*>(data + used) : nullptr;
        used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return out;
    }

  private:
    char* const data;
};

// Weighted cross-entropy of a row of logits. Its gradient times `scale` overwrites them where it is wanted. e: scratch for
// `vocab` floats.
template <class T>
INLINE float cross_entropy_row(T* row, int64_t vocab, int64_t target, float weight, float scale, bool wants_grad, float* e) {
    float highest = wide(row[0]), sum = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < vocab; ++j) {
        const float x = wide(row[j]);
        highest = x > highest ? x : highest;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < vocab; ++j) {
        e[j] = exponential(wide(row[j]) - highest);
        sum += e[j];
    }
    const float loss = (__builtin_logf(sum) - (wide(row[target]) - highest)) * weight;
    if (!wants_grad) return loss;
    const float coefficient = weight * scale, each = coefficient / sum;
#pragma omp simd
    for (int64_t j = 0; j < vocab; ++j) put(row[j], e[j] * each);
    put(row[target], (e[target] / sum - 1.0f) * coefficient);
    return loss;
}

}  // namespace
