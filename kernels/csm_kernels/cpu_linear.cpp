// Matrix products of bf16 on a CPU, as linear layers need them forward and backward.
//
// A thread takes 64 or 128 columns of the right matrix at a time, brings them into pairs (cpu_products.h) that its second-level
// cache holds, and goes down the rows of the left one, together with others at the end. Where the left matrix comes
// transposed, as for the gradient of a weight, the smaller of both is brought into its order once for all threads.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu_products.h"

#ifdef HAS_PRODUCTS

namespace {

// Columns of the right matrix at once, and of those that lie together as pairs.
#ifdef HAS_TILES
constexpr int64_t PANEL = 256, STRIP = BLOCK_SIDE;
constexpr int64_t ROWS = BLOCK_SIDE;  // of a block of the result
#else
#ifdef ADDS_PAIRS
constexpr int64_t PANEL = 64, STRIP = PANEL;
#else
constexpr int64_t PANEL = 128, STRIP = PANEL;  // rows of the left one are widened once for so many
#endif
constexpr int64_t ROWS = TILE_ROWS;
#endif
constexpr int64_t BLOCK = 96;  // rows of a transposed left matrix at once
constexpr int64_t PIECE = 96;  // rows of a panel's product that a thread takes at once; whole tiles

struct Matrix {
    const bf16* data;
    int64_t stride;
    bool is_turned;  // lies as its transpose
};

struct Product {
    Matrix a, b;                   // [rows, inner] and [inner, columns]
    int64_t rows, inner, columns;
    const bf16* plus;              // [rows, columns], added, or null; may be c
    bf16* c;                       // [rows, columns]
    int threads;

    // A turned matrix is filled up with zeros to whole steps of tiles.
#ifdef HAS_TILES
    int64_t pairs() const { return a.is_turned ? whole_lanes((inner + 1) / 2) : (inner + 1) / 2; }
    int64_t depth() const { return a.is_turned ? 2 * pairs() : inner; }
#else
    int64_t pairs() const { return (inner + 1) / 2; }
    int64_t depth() const { return inner; }
#endif
    // Of a turned left matrix's rows, in pairs: no power of two, or a column of it would fall into one set of a cache.
    int64_t left_stride() const { return whole_lanes(pairs()) + LANE; }
    int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
    int64_t panel_size() const { return pairs() * whole_lanes(std::min(PANEL, columns)); }
    // As many as give each thread the same, of at most `most` rows.
    int64_t blocks(int64_t most) const {
        const int64_t least = (rows + most - 1) / most;
        return std::min(rows, (least + threads - 1) / threads * threads);
    }
    bool shares_left() const { return rows <= columns; }
};

// Panel `i` of b as pairs, strip by strip [pairs, its columns rounded up to 16].
void pack(const Product& p, int64_t i, uint32_t* out) {
    const int64_t end = std::min(p.columns, (i + 1) * PANEL);
    for (int64_t first = i * PANEL; first < end; first += STRIP, out += p.pairs() * STRIP) {
        const int64_t width = std::min(STRIP, end - first), stride = whole_lanes(width), filled = (p.inner + 1) / 2;
        if (p.b.is_turned) {
            pairs_of_columns(p.b.data + first * p.b.stride, p.b.stride, width, p.inner, out, stride);
            clear(out + filled * stride, (p.pairs() - filled) * stride);
        } else {
            pairs_of_rows(p.b.data + first, p.b.stride, p.inner, width, p.pairs(), out);
        }
    }
}

// Columns [first, last) of a turned matrix as rows, their pairs along it: [last - first, left stride].
void turn(const Product& p, int64_t first, int64_t last, uint32_t* out) {
    const int64_t stride = p.a.stride, to_stride = p.left_stride();
    for (int64_t pair = 0; pair < p.pairs(); pair += LANE) {
        const bf16* rows = p.a.data + 2 * pair * stride;
        const int64_t left = std::min<int64_t>(2 * LANE, p.inner - 2 * pair);
        // Rows are far apart, which no processor foresees.
        for (int64_t k = 2 * LANE; k < 4 * LANE && 2 * pair + k < p.inner; ++k) {
            for (int64_t column = first; column < last; column += LINE) __builtin_prefetch(rows + k * stride + column, 0, 2);
        }
        for (int64_t column = first; column < last; column += 2 * LANE) {
            const int64_t some = last - column;
            Bits low[LANE], high[LANE];
#pragma GCC unroll 16
            for (int k = 0; k < LANE; ++k) {
                const bf16* row = rows + 2 * k * stride + column;
                const Bits even = load_some(row, 2 * k < left ? some : 0);
                const Bits odd = load_some(row + stride, 2 * k + 1 < left ? some : 0);
                low[k] = paired_low(even, odd);
                high[k] = paired_high(even, odd);
            }
            transpose(low);
            transpose(high);
            uint32_t* to = out + (column - first) * to_stride + pair;
#pragma GCC unroll 16
            for (int k = 0; k < LANE; ++k) {
                const int64_t at = k / 4 * 8 + k % 4;
                if (column + at < last) store_bits(to + at * to_stride, low[k]);
                if (column + at + 4 < last) store_bits(to + (at + 4) * to_stride, high[k]);
            }
        }
    }
}

// Rows [first, last) of c in a strip of at most so many columns. a: at row `first`.
void strip_product(const Product& p, int64_t column, int64_t width, const uint32_t* b, const bf16* a, int64_t a_stride,
                   int64_t first, int64_t last) {
    const int64_t padded = whole_lanes(width);
    bf16* c = p.c + first * p.columns + column;
    const bf16* plus = p.plus ? p.plus + first * p.columns + column : nullptr;
    if (padded == width) {
        multiply(a, a_stride, last - first, b, padded, padded, p.depth(), c, p.columns, plus);
        return;
    }
    bf16 rows[ROWS * STRIP];
    for (int64_t i = 0; i < last - first; i += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, last - first - i);
        for (int64_t k = 0; plus && k < count; ++k) {
            std::memcpy(static_cast<void*>(rows + k * STRIP), plus + (i + k) * p.columns, static_cast<size_t>(width) * 2);
            clear(rows + k * STRIP + width, padded - width);
        }
        multiply(a + i * a_stride, a_stride, count, b, padded, padded, p.depth(), rows, STRIP, plus ? rows : nullptr);
        for (int64_t k = 0; k < count; ++k) {
            std::memcpy(static_cast<void*>(c + (i + k) * p.columns), rows + k * STRIP, static_cast<size_t>(width) * 2);
        }
    }
}

void panel_product(const Product& p, int64_t panel, const uint32_t* b, const bf16* a, int64_t a_stride, int64_t first,
                   int64_t last) {
    const int64_t start = panel * PANEL, end = std::min(p.columns, start + PANEL);
    for (int64_t column = start; column < end; column += STRIP, b += p.pairs() * STRIP) {
        strip_product(p, column, std::min(STRIP, end - column), b, a, a_stride, first, last);
    }
}

// Deals out panels, and at the end the pieces of those that others are still at: a processor that is held up for a while,
// or panels that are too few for the threads, would have all others wait.
class Panels {
  public:
    Panels(int64_t panels, int64_t rows, int threads)
        : panels(panels), rows(rows), pieces((rows + PIECE - 1) / PIECE), taken(static_cast<size_t>(threads)) {
        for (Taken& each : taken) each.pieces.store(pieces);
    }

    // For every thread to call once: prepare(panel) brings it to where others find it, body(panel, thread, first row, last
    // row) multiplies with what that thread has prepared.
    template <class Prepare, class Body>
    void run(int thread, Prepare prepare, Body body) {
        Taken& own = taken[static_cast<size_t>(thread)];
        for (int64_t panel; (panel = next.fetch_add(1)) < panels;) {
            prepare(panel);
            own.pieces.store(panel * MOST);  // only now, so that nobody takes of what is not there yet
            ready.fetch_add(1);
            take(own, thread, body);
        }
        while (ready.load() < panels) _mm_pause();
        // From here on nobody prepares anything, so what they have prepared stays.
        const int threads = static_cast<int>(taken.size());
        for (int other = 1; other < threads; ++other) {
            const int from = (thread + other) % threads;
            take(taken[static_cast<size_t>(from)], from, body);
        }
    }

  private:
    static constexpr int64_t MOST = int64_t{1} << 32;  // pieces of a panel, and more

    struct alignas(64) Taken {
        std::atomic<int64_t> pieces;  // MOST times the panel, and how many pieces of it are taken
    };

    template <class Body>
    void take(Taken& from, int thread, Body body) {
        while (from.pieces.load() % MOST < pieces) {
            const int64_t found = from.pieces.fetch_add(1), piece = found % MOST;
            if (piece >= pieces) return;
            body(found / MOST, thread, piece * PIECE, std::min(rows, (piece + 1) * PIECE));
        }
    }

    const int64_t panels, rows, pieces;
    std::atomic<int64_t> next{0}, ready{0};
    std::vector<Taken> taken;
};

// 32-bit numbers that all threads share, and those that each has for itself.
struct Room {
    uint32_t* shared;
    uint32_t* first;
    int64_t size;

    uint32_t* of(int thread) const { return first + thread * size; }
};

void product(const Product& p, Panels& panels, const Room& room) {
    const Tiles tiles;
    const int64_t stride = p.left_stride();
    const int thread = omp_get_thread_num();
    uint32_t *const shared = room.shared, *const own = room.of(thread);
    const auto with = [&](const bf16* a, int64_t a_stride) {
        panels.run(
            thread, [&](int64_t panel) { pack(p, panel, own); },
            [&](int64_t panel, int owner, int64_t first, int64_t last) {
                panel_product(p, panel, room.of(owner), a + first * a_stride, a_stride, first, last);
            });
    };
    if (!p.a.is_turned) {
        with(p.a.data, p.a.stride);
        return;
    }
    if (p.shares_left()) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (p.rows + 2 * LANE - 1) / (2 * LANE); ++i) {
            turn(p, i * 2 * LANE, std::min(p.rows, (i + 1) * 2 * LANE), shared + i * 2 * LANE * stride);
        }
        with(reinterpret_cast<const bf16*>(shared), 2 * stride);
        return;
    }
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < p.panels(); ++panel) pack(p, panel, shared + panel * p.panel_size());
    const int64_t blocks = p.blocks(BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
        const Share rows = share(p.rows, static_cast<int>(i), static_cast<int>(blocks));
        turn(p, rows.first, rows.last, own);
        for (int64_t panel = 0; panel < p.panels(); ++panel) {
            panel_product(p, panel, shared + panel * p.panel_size(), reinterpret_cast<const bf16*>(own), 2 * stride,
                          rows.first, rows.last);
        }
    }
}

// Of a `Room`.
struct Sizes {
    int64_t shared, own;

    explicit Sizes(const Product& p) {
        if (!p.a.is_turned) {
            shared = 0, own = p.panel_size();
        } else if (p.shares_left()) {
            shared = p.rows * p.left_stride(), own = p.panel_size();
        } else {
            shared = p.panels() * p.panel_size(), own = std::min(BLOCK, p.rows) * p.left_stride();
        }
        shared = whole_lanes(shared), own = whole_lanes(own);
    }
};

Product described(int64_t rows, int64_t inner, int64_t columns, int turned_a, int threads) {
    return {{nullptr, 0, turned_a != 0}, {}, rows, inner, columns, nullptr, nullptr, threads};
}

}  // namespace

// Bytes of scratch that `product_bf16` needs.
extern "C" int64_t product_scratch_bf16(int64_t rows, int64_t inner, int64_t columns, int turned_a, int threads) {
    const Sizes sizes(described(rows, inner, columns, turned_a, threads));
    return 4 * (sizes.shared + threads * sizes.own);
}

// c [rows, columns] = a b, or plus + a b (`plus` may be c). a is [rows, inner], or lies as [inner, rows] (`turned_a`); b is
// [inner, columns], or lies as [columns, inner]. Rows have strides, and are contiguous in c and plus.
extern "C" void product_bf16(const void* a, int64_t a_stride, int turned_a, const void* b, int64_t b_stride, int turned_b,
                             int64_t rows, int64_t inner, int64_t columns, const void* plus, void* c, void* scratch,
                             int threads) {
    Product p = described(rows, inner, columns, turned_a, threads);
    p.a = {static_cast<const bf16*>(a), a_stride, turned_a != 0};
    p.b = {static_cast<const bf16*>(b), b_stride, turned_b != 0};
    p.plus = static_cast<const bf16*>(plus);
    p.c = static_cast<bf16*>(c);
    const Sizes sizes(p);
    uint32_t* const shared = static_cast<uint32_t*>(scratch);
    const Room room{shared, shared + sizes.shared, sizes.own};
    Panels panels(p.panels(), p.rows, threads);
#pragma omp parallel num_threads(threads)
    product(p, panels, room);
}

#endif
