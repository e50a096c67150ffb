// Causal grouped-query attention inside the segments of a pack on a CPU, with the rotation: forward and backward.
//
// A thread takes a segment and a key-value head at a time. Scores exist for a few dozen rows at a time, in float32, in the
// first-level cache. The backward pass recomputes them from the logarithms of the rows' sums (Dao et al., FlashAttention).
// With S = q k^T, P = softmax(S), O = P v: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = dS K, dK = dS^T Q.
// The backward pass uses transposed scores, [keys, queries]: dV and dK then read them as they lie in memory, and dQ^T = K^T dS^T
// reads them as pairs of rows.

#include <omp.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "products.h"

#ifdef HAS_PRODUCTS

namespace {

constexpr int64_t BLOCK_ROWS = 32;      // rows of scores at a time
constexpr int64_t BLOCK_COLUMNS = 128;  // and, in the backward pass, columns

struct Pack {
    const int64_t* bounds;  // [segments + 1], rising from 0
    int64_t segments, heads, kv_heads, width;
    const float *cosine, *sine;  // [angles, width / 2], or null: no rotation
    int64_t angles;
    float factor;  // of the queries
    void* scratch;
    int64_t scratch_bytes;  // of a thread
    int threads;

    int64_t rows() const { return bounds[segments]; }
};

// Calls work(first row, rows, kv head, its Place) for every segment and key-value head, long segments first.
template <class Place, class Work>
void each(const Pack& pack, Work work) {
    const int64_t* bounds = pack.bounds;
    std::vector<int64_t> order(static_cast<size_t>(pack.segments));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [=](int64_t a, int64_t b) { return bounds[a + 1] - bounds[a] > bounds[b + 1] - bounds[b]; });
    const int64_t items = pack.segments * pack.kv_heads;
#pragma omp parallel num_threads(pack.threads)
    {
        const Tiles tiles;
        char* const mine = static_cast<char*>(pack.scratch) + omp_get_thread_num() * pack.scratch_bytes;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < items; ++i) {
            const int64_t segment = order[static_cast<size_t>(i / pack.kv_heads)];
            const int64_t first = bounds[segment], rows = bounds[segment + 1] - first;
            if (rows == 0) continue;
            Scratch scratch(mine);
            work(first, rows, i % pack.kv_heads, Place(scratch, rows, pack.width));
        }
    }
}

// --- rotation --------------------------------------------------------------------------------------------------------

// A register of a row from element j on: pairs (2 i, 2 i + 1) rotated by the angles (sign -1: back), times a factor.
INLINE Floats turned(Floats x, const float* cosine, const float* sine, int64_t j, float sign, float factor) {
    const Floats left = twice_each(sine + j / 2) * (sign * factor);
    return x * factor * twice_each(cosine + j / 2) + neighbours_swapped(x) * even_negative(left);
}

// Stores a float32 row of gradients, scaled and rotated back.
inline void put_row(const Pack& pack, const float* row, int64_t index, float factor, bf16* to) {
    const int64_t at = pack.cosine ? index % pack.angles * (pack.width / 2) : 0;
    for (int64_t j = 0; j < pack.width; j += LANE) {
        const Floats x = load(row + j);
        put_lane(to + j, pack.cosine ? turned(x, pack.cosine + at, pack.sine + at, j, -1.0f, factor) : x * factor);
    }
}

// Rotates and scales rows of heads in place.
void rotate(const Pack& pack, bf16* x, int64_t heads, float factor) {
    if (!pack.cosine && factor == 1.0f) return;
    const int64_t half = pack.width / 2;
    parallel(pack.rows(), pack.threads, [=](int, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const int64_t at = pack.cosine ? row % pack.angles * half : 0;
            for (int64_t head = 0; head < heads; ++head) {
                bf16* numbers = x + (row * heads + head) * pack.width;
                for (int64_t j = 0; j < pack.width; j += LANE) {
                    const Floats in = load(numbers + j);
                    put_lane(numbers + j, pack.cosine ? turned(in, pack.cosine + at, pack.sine + at, j, 1.0f, factor)
                                                      : in * factor);
                }
            }
        }
    });
}

// --- forward ---------------------------------------------------------------------------------------------------------

struct Total {
    float highest, sum;
};

// e^(score - highest) of the first `live` scores of a row as bf16, then zeros; `columns` are whole registers.
INLINE Total softmax_row(const float* scores, int64_t live, int64_t columns, bf16* out) {
    const Floats lowest = Floats{} - std::numeric_limits<float>::infinity();
    const int64_t full = live / LANE * LANE;
    Floats most = lowest;
    for (int64_t j = 0; j < full; j += LANE) most = larger(most, load(scores + j));  // keeps NaN
    if (full < live) most = larger(most, chosen(before(full, live), load(scores + full), lowest));
    const float highest = highest_of(most);
    Floats sum = Floats{};
    for (int64_t j = 0; j < columns; j += LANE) {
        const Floats e = chosen(before(j, live), exponential(load(scores + j) - highest), Floats{});
        sum += e;
        put_lane(out + j, e);
    }
    return {highest, sum_of(sum)};
}

struct ForwardPlace {
    uint32_t *keys, *values;  // pairs, [width / 2, padded] and [padded / 2, width]
    float* scores;            // [BLOCK_ROWS, padded]
    bf16* p;                  // the same
    float* sums;              // [BLOCK_ROWS, width]
    int64_t padded;

    ForwardPlace(Scratch& scratch, int64_t rows, int64_t width) : padded(whole_lanes(rows)) {
        keys = scratch.take<uint32_t>(padded * width / 2);
        values = scratch.take<uint32_t>(padded * width / 2);
        scores = scratch.take<float>(BLOCK_ROWS * padded);
        p = scratch.take<bf16>(BLOCK_ROWS * padded);
        sums = scratch.take<float>(BLOCK_ROWS * width);
    }
};

void forward(const Pack& pack, const bf16* q, const bf16* k, const bf16* v, bf16* out, float* logs) {
    const int64_t width = pack.width, repeat = pack.heads / pack.kv_heads;
    const int64_t q_stride = pack.heads * width, k_stride = pack.kv_heads * width;
    each<ForwardPlace>(pack, [=](int64_t first, int64_t rows, int64_t kv_head, const ForwardPlace& w) {
        const int64_t of_keys = first * k_stride + kv_head * width, padded = w.padded;
        pairs_of_columns(k + of_keys, k_stride, rows, width, w.keys, padded);
        pairs_of_rows(v + of_keys, k_stride, rows, width, padded / 2, w.values);
        for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
            for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
                const int64_t count = std::min(BLOCK_ROWS, rows - row), columns = whole_lanes(row + count);
                const int64_t at = (first + row) * q_stride + head * width;
                multiply(q + at, q_stride, count, w.keys, padded, columns, width, w.scores, padded);
                float inverse[BLOCK_ROWS];
                for (int64_t i = 0; i < count; ++i) {
                    const Total total = softmax_row(w.scores + i * padded, row + i + 1, columns, w.p + i * padded);
                    inverse[i] = 1.0f / total.sum;
                    logs[head * pack.rows() + first + row + i] = total.highest + __builtin_logf(total.sum);
                }
                multiply(w.p, padded, count, w.values, width, width, columns, w.sums, width);
                for (int64_t i = 0; i < count; ++i) {
                    for (int64_t j = 0; j < width; j += LANE) {
                        put_lane(out + at + i * q_stride + j, load(w.sums + i * width + j) * inverse[i]);
                    }
                }
            }
        }
    });
}

// --- backward --------------------------------------------------------------------------------------------------------

// Memory of one segment and key-value head. "_columns" and "_rows" are pairs along these.
struct BackwardPlace {
    uint32_t *q_columns, *grad_columns;  // [width / 2, padded]
    uint32_t *q_rows, *grad_rows;        // [padded / 2, width]
    uint32_t* k_transposed;              // [width, key_stride], K^T with its keys in pairs
    float *dk, *dv;                      // [padded, width]
    float* dq_transposed;                // [width, padded]
    float *logs, *sums;                  // [padded], of the queries
    float *scores, *dp;                  // [BLOCK_ROWS, BLOCK_COLUMNS]
    bf16 *p, *ds;                        // the same
    uint32_t* ds_rows;                   // [BLOCK_ROWS / 2, columns]
    int64_t padded, key_stride;

    // These share memory with others, and are used before or after them.
    uint32_t* k_rows;  // [padded / 2, width], before q_rows
    bf16* grad;        // [rows, width], before dq_transposed
    float* dq;         // [padded, width], after q_columns and grad_columns

    BackwardPlace(Scratch& scratch, int64_t rows, int64_t width)
        : padded(whole_lanes(rows)), key_stride(whole_lanes(padded / 2)) {
        const int64_t block = BLOCK_ROWS * BLOCK_COLUMNS, size = padded * width;
        q_columns = scratch.take<uint32_t>(size);
        grad_columns = q_columns + size / 2;
        dq = reinterpret_cast<float*>(q_columns);
        q_rows = k_rows = scratch.take<uint32_t>(size / 2);
        grad_rows = scratch.take<uint32_t>(size / 2);
        k_transposed = scratch.take<uint32_t>(key_stride * width);
        for (float** x : {&dk, &dv, &dq_transposed}) *x = scratch.take<float>(size);
        grad = reinterpret_cast<bf16*>(dq_transposed);
        for (float** x : {&logs, &sums}) *x = scratch.take<float>(padded);
        for (float** x : {&scores, &dp}) *x = scratch.take<float>(block);
        for (bf16** x : {&p, &ds}) *x = scratch.take<bf16>(block);
        ds_rows = scratch.take<uint32_t>(block / 2);
    }
};

// The gradient of one head and segment, row by row; zeros for rows without a place.
inline void gather(const bf16* grad, const int64_t* places, int64_t first, int64_t rows, int64_t stride, int64_t width,
                   bf16* to) {
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t place = places ? places[first + i] : first + i;
        if (place < 0) {
            clear(to + i * width, width);
        } else {
            std::memcpy(static_cast<void*>(to + i * width), grad + place * stride, static_cast<size_t>(width) * sizeof(bf16));
        }
    }
}

inline float dot(const bf16* a, const bf16* b, int64_t width) {
    Floats sum = Floats{};
    for (int64_t j = 0; j < width; j += LANE) sum += load(a + j) * load(b + j);
    return sum_of(sum);
}

// P^T and dS^T of a block, [keys, columns]: keys from `key` on, queries from `query` on.
inline void score_gradients(const BackwardPlace& w, int64_t key, int64_t keys, int64_t query, int64_t columns) {
    for (int64_t i = 0; i < keys; ++i) {
        const int64_t row = i * BLOCK_COLUMNS;
        for (int64_t j = 0; j < columns; j += LANE) {
            // A query sees the keys up to its own position.
            const Mask sees = others(before(query + j, key + i));
            const Floats p = chosen(sees, exponential(load(w.scores + row + j) - load(w.logs + query + j)), Floats{});
            const Floats ds = p * (load(w.dp + row + j) - load(w.sums + query + j));
            put_lane(w.p + row + j, p);
            put_lane(w.ds + row + j, chosen(sees, ds, Floats{}));
        }
    }
}

// Adds the part of one query head to dk and dv of a segment, and computes its dq. k, v: at the first row of the segment.
void backward_of_head(const BackwardPlace& w, const bf16* q, int64_t q_stride, const bf16* k, const bf16* v, int64_t k_stride,
                      int64_t rows, int64_t width) {
    const int64_t padded = w.padded;
    pairs_of_columns(q, q_stride, rows, width, w.q_columns, padded);
    pairs_of_rows(q, q_stride, rows, width, padded / 2, w.q_rows);
    pairs_of_columns(w.grad, width, rows, width, w.grad_columns, padded);
    pairs_of_rows(w.grad, width, rows, width, padded / 2, w.grad_rows);
    clear(w.dq_transposed, padded * width);
    for (int64_t key = 0; key < rows; key += BLOCK_ROWS) {
        const int64_t keys = std::min(BLOCK_ROWS, rows - key), key_pairs = (keys + 1) / 2;
        const bf16* turned_keys = reinterpret_cast<const bf16*>(w.k_transposed) + key;
        for (int64_t query = key; query < padded; query += BLOCK_COLUMNS) {
            const int64_t columns = std::min(BLOCK_COLUMNS, padded - query);
            multiply(k + key * k_stride, k_stride, keys, w.q_columns + query, padded, columns, width, w.scores,
                     BLOCK_COLUMNS);
            multiply(v + key * k_stride, k_stride, keys, w.grad_columns + query, padded, columns, width, w.dp,
                     BLOCK_COLUMNS);
            score_gradients(w, key, keys, query, columns);
            pairs_of_rows(w.ds, BLOCK_COLUMNS, keys, columns, key_pairs, w.ds_rows);
            const int64_t at = query / 2 * width;
            multiply(w.p, BLOCK_COLUMNS, keys, w.grad_rows + at, width, width, columns, w.dv + key * width, width,
                     w.dv + key * width);
            multiply(w.ds, BLOCK_COLUMNS, keys, w.q_rows + at, width, width, columns, w.dk + key * width, width,
                     w.dk + key * width);
            multiply(turned_keys, 2 * w.key_stride, width, w.ds_rows, columns, columns, 2 * key_pairs, w.dq_transposed + query,
                     padded, w.dq_transposed + query);
        }
    }
    transposed(w.dq_transposed, 2 * padded, width, 2 * padded,
               reinterpret_cast<uint32_t*>(w.dq), width);
}

void backward(const Pack& pack, const bf16* grad, const bf16* out, const int64_t* places, const bf16* q, const bf16* k,
              const bf16* v, const float* logs, bf16* dq, bf16* dk, bf16* dv) {
    const int64_t width = pack.width, repeat = pack.heads / pack.kv_heads;
    const int64_t q_stride = pack.heads * width, k_stride = pack.kv_heads * width;
    each<BackwardPlace>(pack, [=](int64_t first, int64_t rows, int64_t kv_head, const BackwardPlace& w) {
        const int64_t of_keys = first * k_stride + kv_head * width;
        pairs_of_rows(k + of_keys, k_stride, rows, width, w.padded / 2, w.k_rows);
        transposed(w.k_rows, 2 * width, w.padded / 2, 2 * width, w.k_transposed, w.key_stride);
        clear(w.dk, rows * width);
        clear(w.dv, rows * width);
        clear(w.logs, w.padded);
        clear(w.sums, w.padded);
        for (int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
            gather(grad + head * width, places, first, rows, q_stride, width, w.grad);
            std::memcpy(w.logs, logs + head * pack.rows() + first, static_cast<size_t>(rows) * sizeof(float));
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t place = places ? places[first + i] : first + i;
                w.sums[i] = place < 0 ? 0.0f : dot(w.grad + i * width, out + place * q_stride + head * width, width);
            }
            const int64_t of_queries = first * q_stride + head * width;
            backward_of_head(w, q + of_queries, q_stride, k + of_keys, v + of_keys, k_stride, rows, width);
            for (int64_t i = 0; i < rows; ++i) {
                put_row(pack, w.dq + i * width, first + i, pack.factor, dq + of_queries + i * q_stride);
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            put_row(pack, w.dk + i * width, first + i, 1.0f, dk + of_keys + i * k_stride);
            for (int64_t j = 0; j < width; j += LANE) {
                put_lane(dv + of_keys + i * k_stride + j, load(w.dv + i * width + j));
            }
        }
    });
}

}  // namespace

// Bytes of scratch that a thread needs for segments of at most `longest` rows.
extern "C" int64_t attention_scratch_bf16(int64_t longest, int64_t width, int is_backward) {
    Scratch counted(nullptr);
    if (is_backward) {
        BackwardPlace(counted, longest, width);
    } else {
        ForwardPlace(counted, longest, width);
    }
    return counted.used;
}

// bounds: [segments + 1], from 0 to the number of rows T. q, out, grad, dq: [T, heads, width]; k, v, dk, dv: [T, kv_heads,
// width]; logs: [heads, T]; width a multiple of 16. cosine, sine: [angles, width / 2], or null; row t has the angles t modulo
// their number. The forward pass rotates q and k in place, and multiplies q by the factor. The backward pass takes these, and
// computes the gradients of the original q and k. places: [T], for each row the index of its row in grad and out, -1 for one
// without a gradient; null: its own index. scratch: `bytes` for each thread.
extern "C" void attention_forward_bf16(void* q, void* k, const void* v, const float* cosine, const float* sine, int64_t angles,
                                       float factor, const int64_t* bounds, int64_t segments, int64_t heads, int64_t kv_heads,
                                       int64_t width, void* out, float* logs, void* scratch, int64_t bytes, int threads) {
    const Pack pack{bounds, segments, heads, kv_heads, width, cosine, sine, angles, factor, scratch, bytes, threads};
    rotate(pack, static_cast<bf16*>(q), heads, factor);
    rotate(pack, static_cast<bf16*>(k), kv_heads, 1.0f);
    forward(pack, static_cast<const bf16*>(q), static_cast<const bf16*>(k), static_cast<const bf16*>(v),
            static_cast<bf16*>(out), logs);
}

extern "C" void attention_backward_bf16(const void* grad, const void* out, const int64_t* places, const void* q, const void* k,
                                        const void* v, const float* logs, const float* cosine, const float* sine,
                                        int64_t angles, float factor, const int64_t* bounds, int64_t segments, int64_t heads,
                                        int64_t kv_heads, int64_t width, void* dq, void* dk, void* dv, void* scratch, int64_t bytes,
                                        int threads) {
    const Pack pack{bounds, segments, heads, kv_heads, width, cosine, sine, angles, factor, scratch, bytes, threads};
    backward(pack, static_cast<const bf16*>(grad), static_cast<const bf16*>(out), places, static_cast<const bf16*>(q),
             static_cast<const bf16*>(k), static_cast<const bf16*>(v), logs, static_cast<bf16*>(dq), static_cast<bf16*>(dk),
             static_cast<bf16*>(dv));
}

#endif
