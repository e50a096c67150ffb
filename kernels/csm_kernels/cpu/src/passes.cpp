// The operators between the matrix products of a layer on a CPU, one pass over memory each. native.py builds this on first
// use. passes.py says what each function computes, and has the same in PyTorch's operators.

#include <limits>

#include "common.h"

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class X, class Y>
void norm(const X* x, const float* scale, float eps, float* r, Y* y, int64_t rows, int64_t width, int given, int threads) {
    parallel(rows, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const X* in = x + i * width;
            Y* out = y + i * width;
            if (!given) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < width; ++j) sum += wide(in[j]) * wide(in[j]);
                r[i] = 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + eps);
            }
            const float factor = r[i];
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) put(out[j], rounded<X>(wide(in[j]) * factor) * scale[j]);
        }
    });
}

template <class X, class Y>
void norm_backward(const Y* grad, const X* x, const float* r, const float* scale, const X* residual, X* dx, float* dscale,
                   int64_t rows, int64_t width, int threads) {
    parallel(rows, threads, [=](int thread, int64_t first, int64_t last) {
        float* sums = dscale ? dscale + thread * width : nullptr;
        for (int64_t i = first; i < last; ++i) {
            const Y* g = grad + i * width;
            const X* in = x + i * width;
            const float factor = r[i];
            // Explicit registers: the code that the compiler generates for loops over bf16 takes 2.8 times as long.
            const int64_t whole = width / LANES * LANES;
            Floats part[2] = {};
            for (int64_t j = 0; j < whole; j += LANES) {
                const Floats product = load(g + j) * (load(in + j) * factor);
                if (sums) store(sums + j, load(sums + j) + product);
                part[j / LANES % 2] += product * load(scale + j);
            }
            float sum = sum_of(part[0] + part[1]);
            for (int64_t j = whole; j < width; ++j) {
                const float product = wide(g[j]) * (wide(in[j]) * factor);
                if (sums) sums[j] += product;
                sum += product * scale[j];
            }
            const float mean = sum / static_cast<float>(width);
            X* out = dx + i * width;
            const X* add = residual ? residual + i * width : nullptr;
            for (int64_t j = 0; j < whole; j += LANES) {
                Floats found = (load(g + j) * load(scale + j) - load(in + j) * factor * mean) * factor;
                if (add) found += load(add + j);
                store(out + j, found);
            }
            for (int64_t j = whole; j < width; ++j) {
                const float found = (wide(g[j]) * scale[j] - wide(in[j]) * factor * mean) * factor;
                put(out[j], add ? found + wide(add[j]) : found);
            }
        }
    });
}

template <class T>
void swiglu(const T* a, const T* b, T* out, int64_t count, int threads) {
    parallel(count, threads, [=](int, int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            const float x = wide(a[i]);
            put(out[i], x * sigmoid(x) * wide(b[i]));
        }
    });
}

template <class T>
void swiglu_backward(const T* up, const T* a, const T* b, T* product, T* da, T* db, int64_t count, int threads) {
    parallel(count, threads, [=](int, int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
            const float x = wide(a[i]), y = wide(b[i]), g = wide(up[i]);
            const float s = sigmoid(x), silu = x * s;
            put(product[i], silu * y);
            put(da[i], g * y * (s + silu * (1.0f - s)));
            put(db[i], g * silu);
        }
    });
}

// out[i] = in[index[i]], rotated by the angles of the row of `in` (`of_source`) or of `out`. A row has `heads` heads.
template <class T>
void gather_rotated(const T* in, const int64_t* index, const float* cosine, const float* sine, float factor, float sign,
                    int of_source, int64_t heads, int64_t angles, int64_t width, T* out, int64_t count, int threads) {
    const int64_t half = width / 2;
    parallel(count, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t source = index[i];
            const T* from = in + source * width;
            T* to = out + i * width;
            if (!cosine) {
                std::memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
                continue;
            }
            const int64_t row = ((of_source ? source : i) / heads) % angles;
            const float *c = cosine + row * half, *s = sine + row * half;
#pragma omp simd
            for (int64_t j = 0; j < half; ++j) {
                const float even = wide(from[2 * j]), odd = wide(from[2 * j + 1]);
                const float turn_c = c[j] * factor, turn_s = s[j] * factor * sign;
                put(to[2 * j], even * turn_c - odd * turn_s);
                put(to[2 * j + 1], odd * turn_c + even * turn_s);
            }
        }
    });
}

// Rows of scores are short and of any length. The numbers after the last whole register would take longer than all others
// one by one, so the last register of a row ends with the row, and overlaps the one before it.

// Where the registers of a row lie: `whole` registers one after the other, and one more that ends with the row.
struct Cut {
    int64_t whole, tail;

    // For the first `live` numbers of a row of `width` (at least LANES).
    Cut(int64_t live, int64_t width) : whole((live + LANES - 1) / LANES), tail(-1) {
        if (whole * LANES > width) {
            --whole;
            tail = width - LANES;
        }
    }
    int64_t count() const { return whole + (tail >= 0); }
    int64_t at(int64_t i) const { return i < whole ? i * LANES : tail; }
    // The first number that no earlier register holds.
    int64_t fresh(int64_t i) const { return i * LANES; }
};

INLINE Ints columns(int64_t first) {
    Ints out;
    for (int i = 0; i < LANES; ++i) out[i] = i;
    return out + static_cast<int32_t>(first);
}

struct Sum {
    float highest, sum;
};

// e^(x - highest) of the first `live` numbers of a row, register by register, then zeros; and their sum.
template <class T>
INLINE Sum exponentials(const T* row, int64_t live, Cut cut, float* out) {
    const Floats lowest = Floats{} - std::numeric_limits<float>::infinity();
    const int32_t limit = static_cast<int32_t>(live);
    Floats most = lowest;
    for (int64_t i = 0; i < cut.count(); ++i) {
        const int64_t at = cut.at(i);
        const Floats x = columns(at) < limit ? load(row + at) : lowest;
        most = x > most ? x : most;
    }
    const float highest = highest_of(most);
    Floats sum = {};
    for (int64_t i = 0; i < cut.count(); ++i) {
        const int64_t at = cut.at(i);
        const Ints column = columns(at);
        const Floats x = load(row + at) - highest;
        const Floats e = column < limit && !(x < -87.0f) ? exponential(x) : Floats{};
        store(out + i * LANES, e);
        sum += column >= static_cast<int32_t>(cut.fresh(i)) ? e : Floats{};
    }
    return {highest, sum_of(sum)};
}

// Rows of `width` scores come in blocks of `block`; row i of a block sees its first `before` + i + 1 scores.
template <class T>
void causal_softmax(T* scores, int64_t rows, int64_t block, int64_t width, int64_t before, int threads) {
    parallel(rows, threads, [=](int, int64_t first, int64_t last) {
        const Buffer buffer(width);
        float* e = buffer.data;
        for (int64_t i = first; i < last; ++i) {
            T* row = scores + i * width;
            const int64_t live = before + i % block + 1;
            if (width < LANES) {
                float highest = wide(row[0]), sum = 0.0f;
                for (int64_t j = 1; j < live; ++j) highest = wide(row[j]) > highest ? wide(row[j]) : highest;
                for (int64_t j = 0; j < live; ++j) sum += e[j] = exponential(wide(row[j]) - highest);
                for (int64_t j = 0; j < live; ++j) put(row[j], e[j] / sum);
                clear(row + live, width - live);
                continue;
            }
            const Cut cut(live, width);
            const float inverse = 1.0f / exponentials(row, live, cut, e).sum;
            for (int64_t k = 0; k < cut.count(); ++k) store(row + cut.at(k), load(e + k * LANES) * inverse);
            if (cut.tail < 0) clear(row + cut.whole * LANES, width - cut.whole * LANES);
        }
    });
}

template <class T>
void causal_softmax_backward(T* grad, const T* p, int64_t rows, int64_t block, int64_t width, int64_t before, int threads) {
    parallel(rows, threads, [=](int, int64_t first, int64_t last) {
        const Buffer buffer(width);
        float* products = buffer.data;
        for (int64_t i = first; i < last; ++i) {
            T* g = grad + i * width;
            const T* q = p + i * width;
            const int64_t live = before + i % block + 1;
            if (width < LANES) {
                float sum = 0.0f;
                for (int64_t j = 0; j < live; ++j) sum += wide(g[j]) * wide(q[j]);
                for (int64_t j = 0; j < live; ++j) put(g[j], wide(q[j]) * (wide(g[j]) - sum));
                clear(g + live, width - live);
                continue;
            }
            const Cut cut(live, width);
            const int32_t limit = static_cast<int32_t>(live);
            Floats sums = {};
            for (int64_t k = 0; k < cut.count(); ++k) {
                const int64_t at = cut.at(k);
                const Ints column = columns(at);
                const Floats product = column < limit ? load(g + at) * load(q + at) : Floats{};
                store(products + k * LANES, product);
                sums += column >= static_cast<int32_t>(cut.fresh(k)) ? product : Floats{};
            }
            const float sum = sum_of(sums);
            for (int64_t k = 0; k < cut.count(); ++k) {
                const int64_t at = cut.at(k);
                // p is zero after the row's live scores.
                store(g + at, load(products + k * LANES) - load(q + at) * sum);
            }
            if (cut.tail < 0) clear(g + cut.whole * LANES, width - cut.whole * LANES);
        }
    });
}

// Returns the first row whose target is out of bounds (then nothing is computed), or -1.
template <class T>
int64_t cross_entropy(T* logits, const int64_t* targets, const float* weights, float* losses, float scale, int wants_grad,
                      int64_t rows, int64_t vocab, int threads) {
    for (int64_t i = 0; i < rows; ++i) {
        if (targets[i] < 0 || targets[i] >= vocab) return i;
    }
    parallel(rows, threads, [=](int, int64_t first, int64_t last) {
        const Buffer buffer(vocab);
        for (int64_t i = first; i < last; ++i) {
            losses[i] = cross_entropy_row(logits + i * vocab, vocab, targets[i], weights[i], scale, wants_grad, buffer.data);
        }
    });
    return -1;
}

}  // namespace

// One function per pair of types: that of the residual stream and that of the matrix products.
#define NORMS(NAME, X, Y)                                                                                                    \
    extern "C" void norm_##NAME(const void* x, const float* scale, float eps, float* r, void* y, int64_t rows,               \
                                int64_t width, int given, int threads) {                                                     \
        norm(static_cast<const X*>(x), scale, eps, r, static_cast<Y*>(y), rows, width, given, threads);                      \
    }                                                                                                                        \
    extern "C" void norm_backward_##NAME(const void* grad, const void* x, const float* r, const float* scale,                \
                                         const void* residual, void* dx, float* dscale, int64_t rows, int64_t width,         \
                                         int threads) {                                                                      \
        norm_backward(static_cast<const Y*>(grad), static_cast<const X*>(x), r, scale, static_cast<const X*>(residual),      \
                      static_cast<X*>(dx), dscale, rows, width, threads);                                                    \
    }

#define PASSES(NAME, T)                                                                                                      \
    extern "C" void swiglu_##NAME(const void* a, const void* b, void* out, int64_t count, int threads) {                     \
        swiglu(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), count, threads);                    \
    }                                                                                                                        \
    extern "C" void swiglu_backward_##NAME(const void* up, const void* a, const void* b, void* product, void* da, void* db,  \
                                           int64_t count, int threads) {                                                     \
        swiglu_backward(static_cast<const T*>(up), static_cast<const T*>(a), static_cast<const T*>(b),                       \
                        static_cast<T*>(product), static_cast<T*>(da), static_cast<T*>(db), count, threads);                 \
    }                                                                                                                        \
    extern "C" void gather_rotated_##NAME(const void* in, const int64_t* index, const float* cosine, const float* sine,      \
                                          float factor, float sign, int of_source, int64_t heads, int64_t angles,            \
                                          int64_t width, void* out, int64_t count, int threads) {                            \
        gather_rotated(static_cast<const T*>(in), index, cosine, sine, factor, sign, of_source, heads, angles, width,        \
                       static_cast<T*>(out), count, threads);                                                                \
    }                                                                                                                        \
    extern "C" void causal_softmax_##NAME(void* scores, int64_t rows, int64_t block, int64_t width, int64_t before,          \
                                          int threads) {                                                                     \
        causal_softmax(static_cast<T*>(scores), rows, block, width, before, threads);                                        \
    }                                                                                                                        \
    extern "C" void causal_softmax_backward_##NAME(void* grad, const void* p, int64_t rows, int64_t block, int64_t width,    \
                                                   int64_t before, int threads) {                                            \
        causal_softmax_backward(static_cast<T*>(grad), static_cast<const T*>(p), rows, block, width, before, threads);       \
    }                                                                                                                        \
    extern "C" int64_t cross_entropy_##NAME(void* logits, const int64_t* targets, const float* weights, float* losses,          \
                                         float scale, int wants_grad, int64_t rows, int64_t vocab, int threads) {            \
        return cross_entropy(static_cast<T*>(logits), targets, weights, losses, scale, wants_grad, rows, vocab, threads);           \
    }

NORMS(bf16_bf16, bf16, bf16)
NORMS(fp32_bf16, float, bf16)
NORMS(fp32_fp32, float, float)
PASSES(bf16, bf16)
PASSES(fp32, float)
