// Scores and weighted sums of up to 8 query rows against a batch of keys or values: each vector is
// expanded once in registers and serves all rows.
#pragma once

#include "../cpu/simd.h"

namespace sparsekv {

constexpr int BATCH = 64;    // keys processed together
constexpr int MAX_ROWS = 8;  // rows the functions of this file take

// n vectors as float32: survivors with a bitmap, or whole rows without one.
struct Vectors {
    const float* values;    // n * stride, and LANES readable floats more
    const uint8_t* bitmap;  // n * head_size / 8, or nullptr
    int stride;
};

template <bool SPARSE>
inline F next_lanes(const float*& values, const uint8_t*& bitmap) {
    if constexpr (!SPARSE) {
        const F x = load(values);
        values += LANES;
        return x;
    } else {
        const Bits bits = load_bits(bitmap);
        const F x = expand(values, bits);
        values += count_bits(bits);
        bitmap += sizeof(Bits);
        return x;
    }
}

// scores[row][i] = query[row] . key[i]; columns n up to the next multiple of 4 hold junk.
template <int ROWS, bool SPARSE>
void score_rows(const float* query, const Vectors& key, int n, int head_size, float* scores) {
    for (int i = 0; i < n; i += 4) {
        F partial[4][ROWS];
        for (int j = 0; j < 4; ++j) {
            const int column = i + j < n ? i + j : n - 1;
            const float* values = key.values + int64_t(column) * key.stride;
            const uint8_t* bitmap = SPARSE ? key.bitmap + column * (head_size / 8) : nullptr;
            F sums[ROWS] = {};
#pragma GCC unroll 2
            for (int d = 0; d < head_size; d += LANES) {
                const F x = next_lanes<SPARSE>(values, bitmap);
                for (int row = 0; row < ROWS; ++row) sums[row] += x * load(query + row * head_size + d);
            }
            for (int row = 0; row < ROWS; ++row) partial[j][row] = sums[row];
        }
        for (int row = 0; row < ROWS; ++row) sum4(&partial[0][row], ROWS, scores + row * BATCH + i);
    }
}

// out[row] += sum_i weights[row][i] * value[i] for WIDTH vectors of lanes starting at element d.
template <int ROWS, int WIDTH, bool SPARSE>
inline void weigh_columns(
    const float* weights, const Vectors& value, int n, int head_size, int d, int32_t* cursor, float* out) {
    F sums[ROWS][WIDTH];
    for (int row = 0; row < ROWS; ++row)
        for (int w = 0; w < WIDTH; ++w) sums[row][w] = load(out + row * head_size + d + w * LANES);
    for (int i = 0; i < n; ++i) {
        const float* values = value.values + (SPARSE ? cursor[i] : i * value.stride + d);
        const uint8_t* bitmap = SPARSE ? value.bitmap + i * (head_size / 8) + d / 8 : nullptr;
        for (int w = 0; w < WIDTH; ++w) {
            const F x = next_lanes<SPARSE>(values, bitmap);
            for (int row = 0; row < ROWS; ++row)
                sums[row][w] += x * broadcast(weights[row * BATCH + i]);
        }
        if (SPARSE) cursor[i] = static_cast<int32_t>(values - value.values);
    }
    for (int row = 0; row < ROWS; ++row)
        for (int w = 0; w < WIDTH; ++w) store(out + row * head_size + d + w * LANES, sums[row][w]);
}

// out[row] += sum_i weights[row][i] * value[i], row by row of head_size floats.
template <int ROWS, bool SPARSE>
void weigh_rows(const float* weights, const Vectors& value, int n, int head_size, float* out) {
    constexpr int WIDTH = ROWS == 1 ? 8 : ROWS <= 3 ? 4 : ROWS <= 5 ? 2 : 1;  // sums fit registers
    int32_t cursor[BATCH];
    for (int i = 0; i < n; ++i) cursor[i] = i * value.stride;
    int d = 0;
    for (; d + WIDTH * LANES <= head_size; d += WIDTH * LANES)
        weigh_columns<ROWS, WIDTH, SPARSE>(weights, value, n, head_size, d, cursor, out);
    for (; d < head_size; d += LANES)
        weigh_columns<ROWS, 1, SPARSE>(weights, value, n, head_size, d, cursor, out);
}

using ScoreRows = void (*)(const float*, const Vectors&, int, int, float*);
using WeighRows = void (*)(const float*, const Vectors&, int, int, float*);

struct RowKernels {
    ScoreRows score;
    WeighRows weigh;
};

template <bool SPARSE>
inline RowKernels row_kernels(int rows) {
#define SPARSEKV_ROWS(n) RowKernels{score_rows<n, SPARSE>, weigh_rows<n, SPARSE>}
    static constexpr RowKernels TABLE[MAX_ROWS] = {
        SPARSEKV_ROWS(1), SPARSEKV_ROWS(2), SPARSEKV_ROWS(3), SPARSEKV_ROWS(4),
        SPARSEKV_ROWS(5), SPARSEKV_ROWS(6), SPARSEKV_ROWS(7), SPARSEKV_ROWS(8),
    };
#undef SPARSEKV_ROWS
    return TABLE[rows - 1];
}

}  // namespace sparsekv
