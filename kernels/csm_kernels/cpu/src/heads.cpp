// Many linear heads over the same few rows, their cross-entropies and gradients on a CPU. A thread takes a head at a time, and
// reads its weight from memory once; products are computed in pieces of columns, in float32 registers.
//
// With p = softmax(h W): d(loss)/d(logits) = G = w (p - onehot(target)), dh = G W^T, dW = h^T G.

#include <omp.h>

#include <algorithm>

#include "products.h"

#ifdef HAS_PRODUCTS

namespace {

constexpr int64_t PIECE = 256;         // about so many columns of the weight at a time
constexpr int64_t AHEAD = 2;           // pairs of the weight's rows from a prefetch to its use
#ifdef HAS_TILES
constexpr int64_t GRADIENT_ROWS = BLOCK_SIDE;
#else
constexpr int64_t GRADIENT_ROWS = 12;  // rows of the weight's gradient at a time
#endif

struct Heads {
    int64_t rows, heads, width, vocab;
    int64_t hidden_row, hidden_head;  // strides
};

// Pieces of columns with about equally many registers.
struct Pieces {
    int64_t count, vocab;
    explicit Pieces(int64_t vocab_) : count(std::max<int64_t>(1, vocab_ / PIECE)), vocab(vocab_) {}

    Share at(int64_t i) const {
        const Share lanes = share(whole_lanes(vocab) / LANE, static_cast<int>(i), static_cast<int>(count));
        return {lanes.first * LANE, std::min(vocab, lanes.last * LANE)};
    }
};

struct Place {
    bf16* logits;           // [rows, stride], afterwards their gradient
    uint32_t* weight;       // as pairs along its rows, piece by piece [width / 2, piece]; or its columns [vocab / 2, width]
    uint32_t* gradient;     // as pairs along its rows, [row pairs, stride]
    uint32_t* hidden_rows;  // [row pairs, width]
    uint32_t* hidden;       // h^T with its rows in pairs, [width, pair stride]
    float* dh;              // [rows, width]
    bf16* dw;               // [GRADIENT_ROWS, vocab], and one register more
    float* exponentials;    // [vocab]
    int64_t stride, pairs, pair_stride;
    int64_t weight_stride;  // of pairs along columns; not a power of two, because a column would then map to one cache set

    Place(Scratch& scratch, const Heads& sizes) {
        const int64_t width = sizes.width;
        stride = whole_lanes(sizes.vocab), pairs = (sizes.rows + 1) / 2, pair_stride = whole_lanes(pairs);
        logits = scratch.take<bf16>(sizes.rows * stride);
        weight_stride = width + LANE;
        weight = scratch.take<uint32_t>(stride / 2 * weight_stride);
        gradient = scratch.take<uint32_t>(pairs * stride);
        hidden_rows = scratch.take<uint32_t>(pairs * width);
        hidden = scratch.take<uint32_t>(width * pair_stride);
        dh = scratch.take<float>(sizes.rows * width);
        dw = scratch.take<bf16>(GRADIENT_ROWS * sizes.vocab + LANE);
        exponentials = scratch.take<float>(sizes.vocab);
    }
};

void logits_of(const Heads& sizes, const Place& at, const bf16* hidden, const bf16* weight) {
    const Pieces pieces(sizes.vocab);
    const int64_t pairs = sizes.width / 2;
    // Row by row, because memory is read fastest sequentially.
    for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t i = 0; i < pieces.count; ++i) {
            const Share piece = pieces.at(i);
            const int64_t count = piece.last - piece.first;
            const bf16* from = weight + 2 * pair * sizes.vocab + piece.first;
            const bf16* later = from + 2 * AHEAD * sizes.vocab;
            for (int64_t j = 0; j < count; j += LINE) {
                __builtin_prefetch(later + j);
                __builtin_prefetch(later + sizes.vocab + j);
            }
            pairs_of_rows(from, sizes.vocab, 2, count, 1,
                          at.weight + piece.first * pairs + pair * whole_lanes(count));
        }
    }
    for (int64_t i = 0; i < pieces.count; ++i) {
        const Share piece = pieces.at(i);
        const int64_t columns = whole_lanes(piece.last - piece.first);
        multiply(hidden, sizes.hidden_row, sizes.rows, at.weight + piece.first * pairs, columns, columns, sizes.width,
                 at.logits + piece.first, at.stride);
    }
}

void gradient_of_hidden(const Heads& sizes, const Place& at, const bf16* weight, bf16* out, int64_t out_stride) {
    const Pieces pieces(sizes.vocab);
    const int64_t stride = at.weight_stride;
    pairs_of_columns(weight, sizes.vocab, sizes.width, sizes.vocab, at.weight, stride);
    for (int64_t i = 0; i < pieces.count; ++i) {
        const Share piece = pieces.at(i);
        multiply(at.logits + piece.first, at.stride, sizes.rows, at.weight + piece.first / 2 * stride, stride, sizes.width,
                 (piece.last - piece.first + 1) / 2 * 2, at.dh, sizes.width, i > 0 ? at.dh : nullptr);
    }
    for (int64_t row = 0; row < sizes.rows; ++row) {
        for (int64_t j = 0; j < sizes.width; j += LANE) {
            put_lane(out + row * out_stride + j, load(at.dh + row * sizes.width + j));
        }
    }
}

void gradient_of_weight(const Heads& sizes, const Place& at, const bf16* hidden, bf16* out) {
    pairs_of_rows(hidden, sizes.hidden_row, sizes.rows, sizes.width, at.pairs, at.hidden_rows);
    transposed(at.hidden_rows, 2 * sizes.width, at.pairs, 2 * sizes.width, at.hidden, at.pair_stride);
    pairs_of_rows(at.logits, at.stride, sizes.rows, sizes.vocab, at.pairs, at.gradient);
    const bf16* turned = reinterpret_cast<const bf16*>(at.hidden);
    for (int64_t row = 0; row < sizes.width; row += GRADIENT_ROWS) {
        const int64_t some = std::min(GRADIENT_ROWS, sizes.width - row);
        multiply(turned + row * 2 * at.pair_stride, 2 * at.pair_stride, some, at.gradient, at.stride, at.stride, 2 * at.pairs,
                 at.dw, sizes.vocab);
        stream(at.dw, out + row * sizes.vocab, some * sizes.vocab);
    }
}

}  // namespace

// Bytes of scratch that a thread needs.
extern "C" int64_t heads_scratch_bf16(int64_t rows, int64_t heads, int64_t width, int64_t vocab) {
    Scratch counted(nullptr);
    Place(counted, {rows, heads, width, vocab, 0, 0});
    return counted.used;
}

// hidden [rows, heads, width] with strides, weight [heads, width, vocab], targets and weights [rows, heads]; losses [heads],
// weighted sums over rows; grad_hidden [rows, heads, width], grad_weight like weight, null where not wanted. width is a
// multiple of 16. scratch: `heads_scratch_bf16` bytes for each thread. Returns the first row with a target that is out of
// bounds (then nothing is computed), or -1.
extern "C" int64_t heads_cross_entropy_bf16(const void* hidden, int64_t hidden_row, int64_t hidden_head, const void* weight,
                                            const int64_t* targets, const float* weights, float scale, int64_t rows,
                                            int64_t heads, int64_t width, int64_t vocab, float* losses, void* grad_hidden,
                                            void* grad_weight, void* scratch, int threads) {
    for (int64_t i = 0; i < rows * heads; ++i) {
        if (targets[i] < 0 || targets[i] >= vocab) return i / heads;
    }
    const Heads sizes{rows, heads, width, vocab, hidden_row, hidden_head};
    const int64_t bytes = heads_scratch_bf16(rows, heads, width, vocab);
    const bool wants_grad = grad_hidden || grad_weight;
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        Scratch mine(static_cast<char*>(scratch) + omp_get_thread_num() * bytes);
        const Place at(mine, sizes);
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < heads; ++head) {
            const bf16* h = static_cast<const bf16*>(hidden) + head * hidden_head;
            const bf16* w = static_cast<const bf16*>(weight) + head * width * vocab;
            logits_of(sizes, at, h, w);
            float sum = 0.0f;
            for (int64_t row = 0; row < rows; ++row) {
                bf16* logits = at.logits + row * at.stride;
                const int64_t place = row * heads + head;
                sum += cross_entropy_row(logits, vocab, targets[place], weights[place], scale, wants_grad, at.exponentials);
                clear(logits + vocab, at.stride - vocab);
            }
            losses[head] = sum;
            if (grad_hidden) {
                gradient_of_hidden(sizes, at, w, static_cast<bf16*>(grad_hidden) + head * width, heads * width);
            }
            if (grad_weight) gradient_of_weight(sizes, at, h, static_cast<bf16*>(grad_weight) + head * width * vocab);
        }
        _mm_sfence();
    }
    return -1;
}

#endif
