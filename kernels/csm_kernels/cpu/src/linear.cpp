// Matrix products of bf16 on a CPU, for linear layers forward and backward.
//
// A thread takes a panel of the right matrix at a time, 64 columns or more, stores it as pairs (products.h) that fit its
// second-level cache, and multiplies the rows of the left matrix by it; at the end threads help each other. If the left matrix
// is transposed, as for the gradient of a weight, the smaller of both matrices is reordered once for all threads.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <vector>

#include "products.h"

#ifdef HAS_PRODUCTS

namespace {

#ifdef HAS_TILES
constexpr int64_t STRIP = BLOCK_SIDE;        // columns of the right matrix that are stored together as pairs
constexpr int64_t PANEL_BYTES = 1 << 20;     // of the strips of a panel: half of a second-level cache
constexpr int64_t AHEAD = 4;                 // pairs of rows from a prefetch to its use
constexpr int64_t PART = 2048;               // about so much of the inner dimension at a time
constexpr int64_t PIECE = 4 * BLOCK_SIDE;    // rows of a panel's product that a thread takes at a time
constexpr int64_t BLOCK = 2 * PIECE;         // rows of a transposed left matrix at a time
#else
constexpr int64_t PANEL = 64;                // columns of the right matrix at a time
constexpr int64_t PIECE = 96;                // as above; whole tiles
constexpr int64_t BLOCK = PIECE;
#endif

struct Matrix {
    const bf16* data;
    int64_t stride;
    bool is_turned;  // stored as its transpose
};

struct Product {
    Matrix a, b;                   // [rows, inner] and [inner, columns]
    int64_t rows, inner, columns;
    const bf16* plus;              // [rows, columns], added, or null; may be c
    bf16* c;                       // [rows, columns]
    int threads;
    float* sums = nullptr;  // [rows, sums_stride], if the inner dimension is multiplied in parts
    bool is_first = true, is_last = true;  // whether this is the first or the last part

    // A turned matrix is filled up with zeros to whole steps of tiles.
#ifdef HAS_TILES
    int64_t pairs() const { return a.is_turned ? whole_lanes((inner + 1) / 2) : (inner + 1) / 2; }
    int64_t depth() const { return a.is_turned ? 2 * pairs() : inner; }
#else
    int64_t pairs() const { return (inner + 1) / 2; }
    int64_t depth() const { return inner; }
#endif
    // Stride of the rows of a turned left matrix, in pairs. Not a power of two, because a column would then map to one set of
    // a cache.
    int64_t left_stride() const { return whole_lanes(pairs()) + LANE; }
    // Columns of the right matrix at a time.
#ifdef HAS_TILES
    int64_t panel() const {
        const int64_t strips = (columns + STRIP - 1) / STRIP, each = (strips + threads - 1) / threads;
        return std::max<int64_t>(1, std::min(each, PANEL_BYTES / (pairs() * STRIP * 4))) * STRIP;
    }
#else
    int64_t panel() const { return PANEL; }
#endif
    int64_t panels() const { return (columns + panel() - 1) / panel(); }
    int64_t panel_size() const { return pairs() * whole_lanes(std::min(panel(), columns)); }
    // Stride of a piece of the result in the columns of a panel. A piece is stored compactly until it is complete, because
    // lines that are a power of two apart map to one set of a cache.
    int64_t piece_stride() const { return whole_lanes(std::min(panel(), columns)) + LINE; }
#ifdef HAS_TILES
    // Whole strips need no piece, except for one row if the inner dimension is multiplied in parts.
    int64_t piece_size() const { return (columns % STRIP ? std::min(PIECE, rows) : 1) * piece_stride() / 2; }
#else
    int64_t piece_size() const { return 0; }
#endif
    // The number of blocks of at most `most` rows that gives each thread equally many.
    int64_t blocks(int64_t most) const {
        const int64_t least = (rows + most - 1) / most;
        return std::min(rows, (least + threads - 1) / threads * threads);
    }
    bool shares_left() const { return rows <= columns; }
#ifdef HAS_TILES
    int64_t parts() const { return std::max<int64_t>(1, (inner + PART / 2 - 1) / PART); }
#else
    int64_t parts() const { return 1; }
#endif
    int64_t sums_stride() const { return whole_lanes(columns) + LANE; }
    int64_t sums_size() const { return parts() > 1 ? rows * sums_stride() : 0; }
    // Part i of the inner dimension, in whole steps of tiles.
    Product part(int64_t i) const {
        const int64_t steps = (inner + LINE - 1) / LINE;
        const Share mine = share(steps, static_cast<int>(i), static_cast<int>(parts()));
        const int64_t first = mine.first * LINE;
        Product out = *this;
        out.a.data += a.is_turned ? first * a.stride : first;
        out.b.data += b.is_turned ? first : first * b.stride;
        out.inner = std::min(inner, mine.last * LINE) - first;
        out.is_first = i == 0, out.is_last = i + 1 == parts();
        return out;
    }
};

#ifdef HAS_TILES

// Panel `i` of b as pairs, strip by strip [pairs, its columns rounded up to 16].
void pack(const Product& p, int64_t i, uint32_t* out) {
    const int64_t first = i * p.panel(), end = std::min(p.columns, first + p.panel()), pairs = p.pairs();
    if (p.b.is_turned) {
        const int64_t filled = (p.inner + 1) / 2;
        for (int64_t column = first; column < end; column += STRIP, out += pairs * STRIP) {
            const int64_t width = std::min(STRIP, end - column), stride = whole_lanes(width);
            pairs_of_columns(p.b.data + column * p.b.stride, p.b.stride, width, p.inner, out, stride);
            clear(out + filled * stride, (pairs - filled) * stride);
        }
        return;
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t rows = std::min<int64_t>(2, p.inner - 2 * pair);
        const bf16 *row = p.b.data + 2 * pair * p.b.stride, *later = row + 2 * AHEAD * p.b.stride;
        const bool has_later = 2 * (pair + AHEAD) + 1 < p.inner;
        for (int64_t column = first, strip = 0; column < end; column += STRIP, ++strip) {
            const int64_t width = std::min(STRIP, end - column);
            if (has_later) {
                __builtin_prefetch(later + column);
                __builtin_prefetch(later + p.b.stride + column);
            }
            pairs_of_rows(row + column, p.b.stride, rows, width, 1, out + strip * pairs * STRIP + pair * whole_lanes(width));
        }
    }
}

#else

// Panel `i` of b as pairs, [pairs, its columns rounded up to 16].
void pack(const Product& p, int64_t i, uint32_t* out) {
    const int64_t first = i * PANEL, width = std::min(PANEL, p.columns - first);
    if (p.b.is_turned) {
        pairs_of_columns(p.b.data + first * p.b.stride, p.b.stride, width, p.inner, out, whole_lanes(width));
    } else {
        pairs_of_rows(p.b.data + first, p.b.stride, p.inner, width, p.pairs(), out);
    }
}

#endif

// Columns [first, last) of a turned matrix as rows of pairs, [last - first, left stride].
void turn(const Product& p, int64_t first, int64_t last, uint32_t* out) {
    const int64_t stride = p.a.stride, to_stride = p.left_stride();
    for (int64_t pair = 0; pair < p.pairs(); pair += LANE) {
        const bf16* rows = p.a.data + 2 * pair * stride;
        const int64_t left = std::min<int64_t>(2 * LANE, p.inner - 2 * pair);
        // Rows are far apart, so hardware prefetchers do not find them.
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

// Copies rows of `width` columns.
void copy_rows(const bf16* from, int64_t stride, int64_t rows, int64_t width, bf16* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(static_cast<void*>(to + i * to_stride), from + i * stride, static_cast<size_t>(width) * sizeof(bf16));
    }
}

// Computes the rows [first, last) of c, at most PIECE, in the columns of a panel. a: at row `first`. piece: scratch.
void panel_product(const Product& p, int64_t panel, const uint32_t* b, const bf16* a, int64_t a_stride, int64_t first,
                   int64_t last, uint32_t* piece) {
    const int64_t column = panel * p.panel(), width = std::min(p.panel(), p.columns - column), padded = whole_lanes(width);
    bf16* c = p.c + first * p.columns + column;
    const bf16* plus = p.plus ? p.plus + first * p.columns + column : nullptr;
#ifdef HAS_TILES
    bf16* out = reinterpret_cast<bf16*>(piece);
    const int64_t stride = p.piece_stride();
    if (p.sums) {
        float* sums = p.sums + first * p.sums_stride() + column;
        multiply_strips(a, a_stride, last - first, b, p.pairs() * STRIP, padded, p.depth(), sums, p.sums_stride(),
                        p.is_first ? static_cast<const float*>(nullptr) : sums);
        for (int64_t i = 0; p.is_last && i < last - first; ++i, sums += p.sums_stride()) {
            if (plus) copy_rows(plus + i * p.columns, p.columns, 1, width, out, stride);
            for (int64_t j = 0; j < padded; j += LANE) put_lane(out + j, plus ? load(sums + j) + load(out + j) : load(sums + j));
            stream(out, c + i * p.columns, width);
        }
        return;
    }
    if (p.columns % STRIP == 0) {
        const bool is_aligned = reinterpret_cast<uintptr_t>(c) % 64 == 0;
        multiply_strips(a, a_stride, last - first, b, p.pairs() * STRIP, width, p.depth(), c, p.columns, plus, is_aligned);
        return;
    }
    if (plus) copy_rows(plus, p.columns, last - first, width, out, stride);
    const bf16* added = plus ? out : nullptr;
    multiply_strips(a, a_stride, last - first, b, p.pairs() * STRIP, padded, p.depth(), out, stride, added);
    for (int64_t i = 0; i < last - first; ++i) stream(out + i * stride, c + i * p.columns, width);
#else
    (void)piece;
    if (padded == width) {
        multiply(a, a_stride, last - first, b, padded, padded, p.inner, c, p.columns, plus);
        return;
    }
    bf16 rows[TILE_ROWS * PANEL];
    for (int64_t i = 0; i < last - first; i += TILE_ROWS) {
        const int64_t count = std::min<int64_t>(TILE_ROWS, last - first - i);
        if (plus) copy_rows(plus + i * p.columns, p.columns, count, width, rows, PANEL);
        for (int64_t k = 0; plus && k < count; ++k) clear(rows + k * PANEL + width, padded - width);
        multiply(a + i * a_stride, a_stride, count, b, padded, padded, p.inner, rows, PANEL, plus ? rows : nullptr);
        copy_rows(rows, PANEL, count, width, c + i * p.columns, p.columns);
    }
#endif
}

// Distributes panels over threads, and at the end the remaining pieces of other threads' panels. Otherwise all threads would
// wait for one whose processor is interrupted, or if there are fewer panels than threads.
class Panels {
  public:
    Panels(int64_t panels, int64_t rows, int threads)
        : panels(panels), rows(rows), pieces((rows + PIECE - 1) / PIECE), taken(static_cast<size_t>(threads)) {
        for (Taken& each : taken) each.pieces.store(pieces);
    }

    // Every thread calls this once. prepare(panel) stores a panel where other threads find it; body(panel, thread, first row,
    // last row) multiplies rows by the panel that `thread` has prepared.
    template <class Prepare, class Body>
    void run(int thread, Prepare prepare, Body body) {
        Taken& own = taken[static_cast<size_t>(thread)];
        for (int64_t panel; (panel = next.fetch_add(1)) < panels;) {
            prepare(panel);
            own.pieces.store(panel * MOST);  // only now, so that no thread takes pieces of an unprepared panel
            ready.fetch_add(1);
            take(own, thread, body);
        }
        while (ready.load() < panels) _mm_pause();
        // From here on no thread prepares a panel, so the prepared ones remain valid.
        const int threads = static_cast<int>(taken.size());
        for (int other = 1; other < threads; ++other) {
            const int from = (thread + other) % threads;
            take(taken[static_cast<size_t>(from)], from, body);
        }
    }

  private:
    static constexpr int64_t MOST = int64_t{1} << 32;  // more than the pieces of a panel

    struct alignas(64) Taken {
        std::atomic<int64_t> pieces;  // MOST times the panel, plus the number of its pieces that are taken
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

// Scratch of 32-bit numbers: what all threads share, and what each has for itself.
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
    uint32_t *const shared = room.shared, *const own = room.of(thread), *const piece = own + room.size - p.piece_size();
    const auto with = [&](const bf16* a, int64_t a_stride) {
        panels.run(
            thread, [&](int64_t panel) { pack(p, panel, own); },
            [&](int64_t panel, int owner, int64_t first, int64_t last) {
                panel_product(p, panel, room.of(owner), a + first * a_stride, a_stride, first, last, piece);
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
        const bf16* left = reinterpret_cast<const bf16*>(own);
        for (int64_t panel = 0; panel < p.panels(); ++panel) {
            for (int64_t first = rows.first; first < rows.last; first += PIECE) {
                panel_product(p, panel, shared + panel * p.panel_size(), left + (first - rows.first) * 2 * stride, 2 * stride,
                              first, std::min(rows.last, first + PIECE), piece);
            }
        }
    }
}

// Sizes of a `Room` that is large enough for every part of a product.
struct Sizes {
    int64_t shared = 0, own = 0;

    explicit Sizes(const Product& whole) {
        for (int64_t i = 0; i < whole.parts(); ++i) {
            const Product p = whole.part(i);
            int64_t together = 0, alone = 0;
            if (!p.a.is_turned) {
                alone = p.panel_size();
            } else if (p.shares_left()) {
                together = p.rows * p.left_stride(), alone = p.panel_size();
            } else {
                const int64_t blocks = p.blocks(BLOCK);
                together = p.panels() * p.panel_size(), alone = (p.rows + blocks - 1) / blocks * p.left_stride();
            }
            shared = std::max(shared, whole_lanes(together)), own = std::max(own, whole_lanes(alone) + p.piece_size());
        }
    }
};

Product described(int64_t rows, int64_t inner, int64_t columns, int turned_a, int threads) {
    return {{nullptr, 0, turned_a != 0}, {}, rows, inner, columns, nullptr, nullptr, threads};
}

}  // namespace

// Bytes of scratch that `product_bf16` needs.
extern "C" int64_t product_scratch_bf16(int64_t rows, int64_t inner, int64_t columns, int turned_a, int threads) {
    const Product p = described(rows, inner, columns, turned_a, threads);
    const Sizes sizes(p);
    return 4 * (whole_lanes(p.sums_size()) + sizes.shared + threads * sizes.own);
}

// c [rows, columns] = a b, or plus + a b (`plus` may be c). a is [rows, inner], or stored as [inner, rows] (`turned_a`); b is
// [inner, columns], or stored as [columns, inner]. The rows of a and b have strides; c and plus are contiguous.
extern "C" void product_bf16(const void* a, int64_t a_stride, int turned_a, const void* b, int64_t b_stride, int turned_b,
                             int64_t rows, int64_t inner, int64_t columns, const void* plus, void* c, void* scratch,
                             int threads) {
    Product p = described(rows, inner, columns, turned_a, threads);
    p.a = {static_cast<const bf16*>(a), a_stride, turned_a != 0};
    p.b = {static_cast<const bf16*>(b), b_stride, turned_b != 0};
    p.plus = static_cast<const bf16*>(plus);
    p.c = static_cast<bf16*>(c);
    const Sizes sizes(p);
    uint32_t* shared = static_cast<uint32_t*>(scratch);
    if (p.parts() > 1) p.sums = static_cast<float*>(scratch), shared += whole_lanes(p.sums_size());
    const Room room{shared, shared + sizes.shared, sizes.own};
    std::deque<Panels> panels;
    for (int64_t i = 0; i < p.parts(); ++i) panels.emplace_back(p.part(i).panels(), p.rows, threads);
#pragma omp parallel num_threads(threads)
    for (size_t i = 0; i < panels.size(); ++i) {
        product(p.part(static_cast<int64_t>(i)), panels[i], room);
        _mm_sfence();  // for stores past the caches
#pragma omp barrier
    }
}

#endif
