// Scores of int4 keys that keep all their elements, straight from the packed codes.
//
// One load spreads CODES codes over the lanes, NIBBLES to a lane, element lane * NIBBLES + i in
// nibble i. A nibble is masked where it stands and converted, so it counts 16^i times its code; the
// query, ordered alike, is divided by that. Codes count from MIDDLE, so that products do not cancel;
// what the zero of a key differs from it meets the lanes' sums of the query.
#pragma once

#include "rows.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int CODES = 64;
constexpr int NIBBLES = CODES / LANES;
constexpr int MIDDLE = 8;

inline int code_blocks(int head_size) { return (head_size + CODES - 1) / CODES; }

// Floats of each row in order_queries().
inline int code_query_size(int head_size) { return LANES + code_blocks(head_size) * CODES; }

// Rows of the query, vector by vector, row by row: the rows' sums over the elements of each lane,
// then their elements in the order of the codes.
inline void order_queries(const float* query, int rows, int head_size, float* out) {
    if (head_size % CODES) memset(out, 0, sizeof(float) * rows * code_query_size(head_size));
    for (int row = 0; row < rows; ++row, query += head_size, out += LANES) {
        F sums{};
        for (int first = 0; first < head_size; first += CODES) {
            const int left = head_size - first, lanes = left < CODES ? left / NIBBLES : LANES;
            for (int nibble = 0; nibble < NIBBLES; ++nibble) {
                const float unit = nibble == NIBBLES - 1 ? 1.f : 1.f / (1 << 4 * nibble);
                float* vector = out + (1 + first / CODES * NIBBLES + nibble) * rows * LANES;
                F elements{};
                for (int lane = 0; lane < lanes; ++lane) elements[lane] = query[first + lane * NIBBLES + nibble];
                store(vector, elements * unit);
                sums += elements;
            }
        }
        store(out, sums);
    }
}

inline I load_codes(const uint8_t* p) {
#if defined(__AVX512F__)
    return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
    I codes;
    memcpy(&codes, p, sizeof codes);
    return codes;
#endif
}

// Nibble NIBBLE of every lane; the last one is shifted down, clear of the sign.
template <int NIBBLE>
inline F code_values(I codes) {
    constexpr int UNIT = NIBBLE == NIBBLES - 1 ? 1 : 1 << 4 * NIBBLE;
    if constexpr (NIBBLE == NIBBLES - 1) codes >>= 4 * NIBBLE;
    return __builtin_convertvector(codes & 15 * UNIT, F) - float(MIDDLE * UNIT);
}

template <int ROWS, int TOGETHER, int NIBBLE = 0>
inline void add_codes(const I (&codes)[TOGETHER], const float* query, F (&sums)[TOGETHER][ROWS]) {
    F x[TOGETHER];
    for (int j = 0; j < TOGETHER; ++j) x[j] = code_values<NIBBLE>(codes[j]);
    for (int row = 0; row < ROWS; ++row) {
        const F q = load(query + (NIBBLE * ROWS + row) * LANES);
        for (int j = 0; j < TOGETHER; ++j) add_product(sums[j][row], x[j], q);
    }
    if constexpr (NIBBLE + 1 < NIBBLES) add_codes<ROWS, TOGETHER, NIBBLE + 1>(codes, query, sums);
}

// As score_rows(), for order_queries() of just these rows.
template <int ROWS>
void score_codes(const float* query, const Vectors& key, int n, int head_size, float* scores, Ahead& ahead) {
    constexpr int TOGETHER = ROWS <= 2 ? 4 : 2;
    const int blocks = code_blocks(head_size);
    for (int i = 0; i < n; i += 4) {
        ahead.fetch(4);
        F partial[4][ROWS];
        for (int first = 0; first < 4; first += TOGETHER) {
            const uint8_t* values = key.values + (i + first) * key.stride;
            F sums[TOGETHER][ROWS];
            for (int row = 0; row < ROWS; ++row)
                for (int j = 0; j < TOGETHER; ++j)
                    sums[j][row] = load(query + row * LANES) * (MIDDLE - key.zeros[i + first + j]);
            const float* q = query + ROWS * LANES;
            for (int block = 0; block < blocks; ++block, q += ROWS * CODES) {
                I codes[TOGETHER];
                for (int j = 0; j < TOGETHER; ++j)
                    codes[j] = load_codes(values + j * key.stride + block * (CODES / 2));
                add_codes<ROWS, TOGETHER>(codes, q, sums);
            }
            for (int j = 0; j < TOGETHER; ++j)
                for (int row = 0; row < ROWS; ++row) partial[first + j][row] = sums[j][row];
        }
        for (int row = 0; row < ROWS; ++row) sum4(&partial[0][row], ROWS, scores + row * BATCH + i);
    }
}

// The function for 1 to ROW_BLOCK rows.
inline RowKernel code_kernel(int rows) {
    static constexpr RowKernel TABLE[] = {score_codes<1>, score_codes<2>, score_codes<3>, score_codes<4>};
    return TABLE[rows - 1];
}

}  // namespace sparsekv::SPARSEKV_ISA
