// An update of AdamW on a CPU in one pass over memory, which reads weights, gradient and moments once and writes them once;
// and the sums of squares for the norm of gradients. native.py builds this on first use. adamw.py says what each function
// computes.

#include <cmath>

#include "common.h"

namespace {

// The compiler's command line passes the constant of constants.py.
constexpr int64_t TILE = DRAW_TILE;  // elements whose random bits are hashed: `Draws` in train/optim/rounding.py
constexpr int64_t PIECE = 1024;      // elements whose random bits are made at once
constexpr int64_t ROWS = 32;         // consecutive rows of a table for one thread

enum Rounding { NEAREST, STOCHASTIC, KAHAN };

INLINE uint32_t mixed(uint32_t x) { return (x ^ (x >> 16)) * 0x7FEB352Du; }

INLINE uint32_t finished(uint32_t x) {
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// The random bits of `Draws` in csm_fast/train/optim/rounding.py, bit for bit: 16 for every element of a parameter.
class Draws {
  public:
    Draws(uint32_t counters_, uint32_t salt, uint32_t tiles_, float step)
        : counters(counters_), tiles(tiles_), moment(mixed(mixed(static_cast<uint32_t>(static_cast<int32_t>(step)) + salt))) {}

    // The bits of `count` elements from `first`, all in one tile. Returns where they begin in `out`, which has room for two
    // elements more.
    INLINE const uint16_t* of(int64_t first, int64_t count, uint16_t* out) const {
        const int64_t tile = first / TILE, begin = first % TILE / 2, end = (first % TILE + count - 1) / 2 + 1;
        const uint32_t start = counters + static_cast<uint32_t>(begin), key = key_of(tile);
#pragma omp simd
        for (int32_t i = 0; i < static_cast<int32_t>(end - begin); ++i) {
            const uint32_t word = finished(mixed(start + static_cast<uint32_t>(i)) ^ moment) ^ key;
            out[2 * i] = static_cast<uint16_t>(word);
            out[2 * i + 1] = static_cast<uint16_t>(word >> 16);
        }
        return out + first % 2;
    }

  private:
    // The key of both halves of a word.
    uint32_t key_of(int64_t tile) const {
        if (!tile) return 0;
        const uint32_t word = finished(mixed(tiles + static_cast<uint32_t>(tile / 2)) ^ mixed(moment));
        return (tile % 2 ? word >> 16 : word & 0xFFFF) * 0x10001u;
    }

    const uint32_t counters, tiles, moment;
};

struct Moments {
    float *mean, *square;
};

struct Settings {
    float factor;       // of the gradient
    float keep;         // 1 - lr weight_decay
    float fresh;        // 1 - beta1
    float beta2, fresh_square;
    float root;         // sqrt(1 - beta2^t)
    float eps;
    float size;         // lr / (1 - beta1^t)
};

// Updates `count` neighbouring elements.
template <class T, Rounding ROUNDING>
INLINE void advance(T* w, const T* g, float* m, float* v, bf16* c, const uint16_t* drawn, int64_t count, const Settings& s) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float slope = wide(g[i]) * s.factor;
        float x = wide(w[i]);
        if constexpr (ROUNDING == KAHAN) x += wide(c[i]);
        x *= s.keep;
        m[i] += s.fresh * (slope - m[i]);
        v[i] = v[i] * s.beta2 + s.fresh_square * slope * slope;
        x -= s.size * m[i] / (__builtin_sqrtf(v[i]) / s.root + s.eps);
        if constexpr (ROUNDING == STOCHASTIC) {
            // Truncate after adding noise of less than one spacing to the magnitude.
            uint32_t bits;
            std::memcpy(&bits, &x, sizeof bits);
            w[i].bits = static_cast<uint16_t>((bits + drawn[i]) >> 16);
        } else {
            put(w[i], x);
            if constexpr (ROUNDING == KAHAN) put(c[i], x - wide(w[i]));
        }
    }
}

// Updates the elements [first, last).
template <class T, Rounding ROUNDING>
void update(T* weight, const T* grad, Moments moments, bf16* rest, int64_t first, int64_t last, Settings s, const Draws& draws) {
    alignas(64) uint16_t room[PIECE + 2];
    for (int64_t at = first; at < last;) {
        const int64_t end = at / PIECE * PIECE + PIECE, count = (end < last ? end : last) - at;
        bf16* c = ROUNDING == KAHAN ? rest + at : nullptr;
        const uint16_t* drawn = ROUNDING == STOCHASTIC ? draws.of(at, count, room) : room;
        advance<T, ROUNDING>(weight + at, grad + at, moments.mean + at, moments.square + at, c, drawn, count, s);
        at += count;
    }
}

// Whether a row has an element other than zero; NaN counts.
template <class T>
INLINE bool any(const T* row, int64_t width) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < width; ++i) found |= wide(row[i]) != 0.0f;
    return found;
}

// Updates all rows; with `live` those that are marked there and those whose gradient is not zero, which it marks.
template <class T, Rounding ROUNDING>
void updates(T* weight, const T* grad, Moments moments, bf16* rest, uint8_t* live, int64_t rows, int64_t width,
             Settings s, const Draws& draws, int threads) {
    if (!live) {
        const int64_t pieces = (rows * width + PIECE - 1) / PIECE;
        parallel(pieces, threads, [=, &draws](int, int64_t first, int64_t last) {
            const int64_t end = last * PIECE < rows * width ? last * PIECE : rows * width;
            update<T, ROUNDING>(weight, grad, moments, rest, first * PIECE, end, s, draws);
        });
        return;
    }
    // Rows of common tokens lie close together, so blocks of rows go to the threads in turn.
    parallel(threads, threads, [=, &draws](int thread, int64_t, int64_t) {
        for (int64_t block = thread * ROWS; block < rows; block += threads * ROWS) {
            for (int64_t row = block; row < block + ROWS && row < rows; ++row) {
                if (!live[row] && !any(grad + row * width, width)) continue;
                live[row] = 1;
                update<T, ROUNDING>(weight, grad, moments, rest, row * width, row * width + width, s, draws);
            }
        }
    });
}

template <class T>
void adamw(T* weight, const T* grad, Moments moments, bf16* rest, uint8_t* live, int64_t rows, int64_t width, const float* step,
           const float* found_inf, const float* grad_scale, double lr, double beta1, double beta2, double weight_decay,
           double eps, int stochastic, int64_t counters, int64_t salt, int64_t tiles, int threads) {
    if (found_inf && *found_inf == 1.0f) return;
    const double t = *step, root = std::sqrt(1.0 - std::pow(beta2, t));
    const Settings settings = {
        grad_scale ? 1.0f / *grad_scale : 1.0f,
        static_cast<float>(1.0 - lr * weight_decay),
        static_cast<float>(1.0 - beta1),
        static_cast<float>(beta2),
        static_cast<float>(1.0 - beta2),
        static_cast<float>(root),
        static_cast<float>(eps),
        static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
    };
    const Draws draws(static_cast<uint32_t>(counters), static_cast<uint32_t>(salt), static_cast<uint32_t>(tiles), *step);
    if constexpr (sizeof(T) == 2) {
        if (rest) {
            updates<T, KAHAN>(weight, grad, moments, rest, live, rows, width, settings, draws, threads);
            return;
        }
        if (stochastic) {
            updates<T, STOCHASTIC>(weight, grad, moments, rest, live, rows, width, settings, draws, threads);
            return;
        }
    }
    updates<T, NEAREST>(weight, grad, moments, rest, live, rows, width, settings, draws, threads);
}

template <class T>
INLINE float squares(const T* x, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += wide(x[i]) * wide(x[i]);
    return sum;
}

// A partial sum for every `piece` of the `count` numbers, so that the sums do not depend on the number of threads.
template <class T>
void sums_of_squares(const T* x, int64_t count, int64_t piece, double* sums, int threads) {
    parallel((count + piece - 1) / piece, threads, [=](int, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t left = count - i * piece;
            sums[i] = squares(x + i * piece, left < piece ? left : piece);
        }
    });
}

}  // namespace

#define UPDATES(NAME, T)                                                                                                     \
    extern "C" void adamw_##NAME(void* weight, const void* grad, float* mean, float* square, void* rest, uint8_t* live,      \
                                 int64_t rows, int64_t width, const float* step, const float* found_inf,                     \
                                 const float* grad_scale, double lr, double beta1, double beta2, double weight_decay,        \
                                 double eps, int stochastic, int64_t counters, int64_t salt, int64_t tiles, int threads) {   \
        adamw(static_cast<T*>(weight), static_cast<const T*>(grad), {mean, square}, static_cast<bf16*>(rest), live, rows,    \
              width, step, found_inf, grad_scale, lr, beta1, beta2, weight_decay, eps, stochastic, counters, salt, tiles,    \
              threads);                                                                                                      \
    }                                                                                                                        \
    extern "C" void sums_of_squares_##NAME(const void* x, int64_t count, int64_t piece, double* sums, int threads) {         \
        sums_of_squares(static_cast<const T*>(x), count, piece, sums, threads);                                              \
    }

UPDATES(bf16, bf16)
UPDATES(fp32, float)
