// Scores and weighted sums of a few query rows against a batch of keys or values: each vector is
// expanded once in registers and serves all of them.
#pragma once

#include "../cpu/expand.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int BATCH = 64;     // keys processed together
constexpr int ROW_BLOCK = 4;  // rows the functions of this file take at most
constexpr int OVERREAD = 64;  // bytes that expand() may read past the last survivor

// Beside the numbers of Storage: float32 rows without a bitmap, and what is added to the storage of
// vectors that keep all their elements. Kernels know no FP8 (batch.h), and INT3 and INT2 only with
// WHOLE; whole integer vectors are packed codes.
constexpr int DENSE = -1;
constexpr int WHOLE = 4;
constexpr bool is_packed(int storage) { return storage >= INT4 + WHOLE; }

// A batch of keys or values in working memory. All BATCH entries are readable, whatever they hold,
// and so are OVERREAD bytes past a vector that takes all of its elements.
struct Vectors {
    const uint8_t* values;    // `stride` bytes each
    const uint8_t* bitmap;    // head_size / 8 bytes each, unless DENSE or WHOLE
    int64_t stride;
    const float* units;  // what each counts in, BATCH of them
    const float* zeros;  // the code of value 0 of each, BATCH of them, where is_packed()
    const uint8_t* scales;  // as in a page, where is_packed()
};

// Memory that is read next: each kernel asks for a piece now and then, so that the loads spread over
// the work before.
struct Ahead {
    const uint8_t *next = nullptr, *end = nullptr;
    int64_t piece = 0;  // bytes for every key that is processed, half of them by either kernel

    void fetch(int keys) {
        const uint8_t* stop = next + keys * piece / 2;
        if (stop > end) stop = end;
        for (; next < stop; next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Walks one vector, LANES elements at a time.
template <int STORAGE>
struct Walk {
    const uint8_t *values, *bitmap;

    Walk() = default;
    Walk(const uint8_t* values, const uint8_t* bitmap) : values(values), bitmap(bitmap) {}

    F next() {
        if constexpr (STORAGE == DENSE) {
            const F x = load(reinterpret_cast<const float*>(values));
            values += sizeof(F);
            return x;
        } else if constexpr (is_packed(STORAGE)) {
            constexpr int BITS = storage_bits(STORAGE - WHOLE);
            const F x = spread_codes<BITS>(values);
            values += LANES * BITS / 8;
            return x;
        } else if constexpr (STORAGE > INT4) {
            const F x = load_halves<STORAGE - WHOLE>(values);
            values += LANES * survivor_bytes(STORAGE - WHOLE);
            return x;
        } else {
            uint64_t bits = load_bits(bitmap);
            const uint64_t count = count_bits(bits);
            const F x = expand<STORAGE>(values, bits);
            values += survivor_bytes(STORAGE) * count;
            bitmap += sizeof(Bits);
            return x;
        }
    }
};

// scores[row * BATCH + i] = query[row] . key[i], without the unit; columns n up to a multiple of 4 hold junk.
template <int STORAGE, int ROWS>
void score_rows(const float* query, const Vectors& key, int n, int head_size, float* scores, Ahead& ahead) {
    constexpr int TOGETHER = ROWS <= 2 ? 4 : 2;  // keys that share a load of the query
    const uint8_t *values = key.values, *bitmap = key.bitmap;
    for (int i = 0; i < n; i += 4) {
        ahead.fetch(4);
        F partial[4][ROWS];
        for (int first = 0; first < 4; first += TOGETHER) {
            Walk<STORAGE> walk[TOGETHER];
            for (int j = 0; j < TOGETHER; ++j) {
                walk[j] = Walk<STORAGE>(values, bitmap);
                values += key.stride;
                bitmap += unsigned(head_size) / 8;
            }
            F sums[TOGETHER][ROWS] = {};
            const float* q = query;
#pragma GCC unroll 2
            for (int d = 0; d < head_size; d += LANES, q += LANES) {
                F x[TOGETHER];
                for (int j = 0; j < TOGETHER; ++j) {
                    x[j] = walk[j].next();
                    if constexpr (is_packed(STORAGE)) x[j] -= key.zeros[i + first + j];
                }
                for (int row = 0; row < ROWS; ++row) {
                    const F y = load(q + row * head_size);
                    for (int j = 0; j < TOGETHER; ++j) add_product(sums[j][row], x[j], y);
                }
            }
            for (int j = 0; j < TOGETHER; ++j)
                for (int row = 0; row < ROWS; ++row) partial[first + j][row] = sums[j][row];
        }
        for (int row = 0; row < ROWS; ++row) sum4(&partial[0][row], ROWS, scores + row * BATCH + i);
    }
}

// out[row] += sum_i weights[row][i] * value[i] for WIDTH registers of elements starting at d.
// begin[i] is where the values of vector i from d on lie, and is moved on.
template <int STORAGE, int ROWS, int WIDTH>
inline void weigh_columns(
    const float* weights, const Vectors& value, int n, int head_size, int d, const uint8_t** begin, float* out) {
    F sums[ROWS][WIDTH];
    for (int row = 0; row < ROWS; ++row)
        for (int w = 0; w < WIDTH; ++w) sums[row][w] = load(out + row * head_size + d + w * LANES);
    const uint8_t* bitmap = value.bitmap + d / 8;
    for (int i = 0; i < n; ++i, bitmap += unsigned(head_size) / 8) {
        Walk<STORAGE> walk(begin[i], bitmap);
        F weight[ROWS];
        for (int row = 0; row < ROWS; ++row) weight[row] = broadcast(weights[row * BATCH + i]);
        for (int w = 0; w < WIDTH; ++w) {
            F x = walk.next();
            if constexpr (is_packed(STORAGE)) x -= value.zeros[i];
            for (int row = 0; row < ROWS; ++row) add_product(sums[row][w], x, weight[row]);
        }
        begin[i] = walk.values;
    }
    for (int row = 0; row < ROWS; ++row)
        for (int w = 0; w < WIDTH; ++w) store(out + row * head_size + d + w * LANES, sums[row][w]);
}

// out[row] += sum_i weights[row * BATCH + i] * value[i], rows of head_size floats; the weights hold
// the units.
template <int STORAGE, int ROWS>
void weigh_rows(const float* weights, const Vectors& value, int n, int head_size, float* out, Ahead& ahead) {
    constexpr int WIDTH = ROWS == 1 ? 8 : ROWS == 2 ? 4 : ROWS == 3 ? 3 : 2;  // the sums fit registers
    const uint8_t* begin[BATCH];
    for (int i = 0; i < n; ++i) begin[i] = value.values + i * value.stride;
    int d = 0;
    for (; d + WIDTH * LANES <= head_size; d += WIDTH * LANES) {
        ahead.fetch(n * WIDTH * LANES / head_size);
        weigh_columns<STORAGE, ROWS, WIDTH>(weights, value, n, head_size, d, begin, out);
    }
    for (; d + 2 * LANES <= head_size; d += 2 * LANES)
        weigh_columns<STORAGE, ROWS, 2>(weights, value, n, head_size, d, begin, out);
    for (; d < head_size; d += LANES)
        weigh_columns<STORAGE, ROWS, 1>(weights, value, n, head_size, d, begin, out);
}

using RowKernel = void (*)(const float*, const Vectors&, int, int, float*, Ahead&);

// The function for a storage and 1 to ROW_BLOCK rows.
#define SPARSEKV_ROWS(function, storage) \
    { function<storage, 1>, function<storage, 2>, function<storage, 3>, function<storage, 4> }
#define SPARSEKV_STORAGES(function, int4_whole)                                            \
    {                                                                                      \
        SPARSEKV_ROWS(function, DENSE), SPARSEKV_ROWS(function, FLOAT32),                  \
            SPARSEKV_ROWS(function, BFLOAT16), SPARSEKV_ROWS(function, FLOAT16), {},       \
            SPARSEKV_ROWS(function, INT4), SPARSEKV_ROWS(function, BFLOAT16 + WHOLE),      \
            SPARSEKV_ROWS(function, FLOAT16 + WHOLE), {}, int4_whole,                      \
            SPARSEKV_ROWS(function, INT3 + WHOLE), SPARSEKV_ROWS(function, INT2 + WHOLE)   \
    }
// Without keys of INT4 + WHOLE, which codes.h scores.
inline RowKernel score_kernel(int storage, int rows) {
    static constexpr RowKernel TABLE[][ROW_BLOCK] = SPARSEKV_STORAGES(score_rows, {});
    return TABLE[storage + 1][rows - 1];
}
inline RowKernel weigh_kernel(int storage, int rows) {
    static constexpr RowKernel TABLE[][ROW_BLOCK] =
        SPARSEKV_STORAGES(weigh_rows, SPARSEKV_ROWS(weigh_rows, INT4 + WHOLE));
    return TABLE[storage + 1][rows - 1];
}
#undef SPARSEKV_STORAGES
#undef SPARSEKV_ROWS

}  // namespace sparsekv::SPARSEKV_ISA
