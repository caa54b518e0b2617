// Products of pairs of bfloat16 by dot products in vector registers. See pairs.h.
#pragma once

#include "halves.h"

#if defined(__AVX512BF16__)

namespace sparsekv::SPARSEKV_ISA {

class Dots {
  public:
    static void begin(int) {}
    static void end() {}

    // Scores of `rows` rows of the query, by elements first to last, and n keys.
    static void score(const uint16_t* query, int size, int rows, const uint32_t* columns, int n, int first, int last,
                      float* scores) {
        for (int row = 0; row < rows; row += ROWS)
            for (int i = 0; i < n; i += 2 * TILE) {
                F sums[ROWS][2] = {};
                for (int d = first; d < last; d += PAIRS_DEPTH) {
                    const uint16_t* elements = query + row * size + d;
                    const uint32_t *low = columns + column_tile(i, d), *high = columns + column_tile(i + TILE, d);
                    for (int pair = 0; pair < TILE; ++pair, elements += 2, low += TILE, high += TILE)
                        add_pairs(elements, size, low, high, sums);
                }
                for (int j = 0; j < ROWS; ++j) {
                    store(scores + (row + j) * PAIR_BATCH + i, sums[j][0]);
                    store(scores + (row + j) * PAIR_BATCH + i + TILE, sums[j][1]);
                }
            }
    }

    // Adds n values, weighted by two parts each, to `rows` rows of the result.
    static void add(const uint16_t* weights, const uint16_t* rest, int rows, const uint32_t* values, int n, int size,
                    float* out) {
        for (int row = 0; row < rows; row += ROWS)
            for (int d = 0; d < size; d += 2 * TILE) {
                F sums[ROWS][2];
                for (int j = 0; j < ROWS; ++j)
                    for (int k = 0; k < 2; ++k) sums[j][k] = load(out + (row + j) * size + d + k * TILE);
                for (int i = 0; i < n; i += 2) {
                    const uint32_t* pairs = values + i / 2 * size + d;
                    add_pairs(weights + row * PAIR_BATCH + i, PAIR_BATCH, pairs, pairs + TILE, sums);
                    add_pairs(rest + row * PAIR_BATCH + i, PAIR_BATCH, pairs, pairs + TILE, sums);
                }
                for (int j = 0; j < ROWS; ++j)
                    for (int k = 0; k < 2; ++k) store(out + (row + j) * size + d + k * TILE, sums[j][k]);
            }
    }

  private:
    static constexpr int ROWS = 8;  // together; the sums fit registers

    // A pair of each of the rows that begin at `left`, times 32 pairs.
    static void add_pairs(const uint16_t* left, int stride, const uint32_t* low, const uint32_t* high,
                          F (&sums)[ROWS][2]) {
        const __m512i right[] = {_mm512_loadu_si512(low), _mm512_loadu_si512(high)};
        for (int row = 0; row < ROWS; ++row) {
            int32_t pair;
            memcpy(&pair, left + row * stride, sizeof pair);
            const __m512i both = _mm512_set1_epi32(pair);
            for (int k = 0; k < 2; ++k)
                sums[row][k] = _mm512_dpbf16_ps(sums[row][k], (__m512bh)both, (__m512bh)right[k]);
        }
    }
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
