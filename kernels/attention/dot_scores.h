// Scores of a few query rows of bfloat16 models by dot products of pairs, where the processor has them:
// whole integer keys less their zeros, and dense keys, are bfloat16 without loss (halves.h).
#pragma once

#include "halves.h"
#include "rows.h"

namespace sparsekv::SPARSEKV_ISA {

#if defined(__AVX512BF16__)

inline bool scores_by_dots(const Layout& layout) {
    return layout.storage == BFLOAT16 && layout.head_size % HALVES == 0 && is_integer(layout.key.storage) &&
           layout.key.storage != INT4_INT2 && layout.key.survivors == layout.head_size;
}

// 32 elements at a time of a key, as bfloat16.
template <int STORAGE>
struct Halved : HalvesOf<storage_bits(STORAGE)> {
    explicit Halved(const uint8_t* scale) : HalvesOf<storage_bits(STORAGE)>(scale) {}
    __m512i at(const uint8_t* values, int d) const { return this->next(values + d * storage_bits(STORAGE) / 8); }
};
template <>
struct Halved<BFLOAT16> {
    explicit Halved(const uint8_t*) {}
    __m512i at(const uint8_t* values, int d) const { return _mm512_loadu_si512(values + 2 * d); }
};

// scores[row * BATCH + i] = scale * query[row] . key[i], without the unit; columns n up to a multiple of
// 4 hold junk.
template <int STORAGE, int ROWS>
void dot_rows(const uint16_t* query, const Vectors& key, int n, int head_size, float scale, float* scores,
              Ahead& ahead) {
    for (int i = 0; i < n; i += 4) {
        ahead.fetch(4);
        const uint8_t *values = key.values + i * key.stride, *scales = key.scales + 2 * i;
        const Halved<STORAGE> keys[4] = {Halved<STORAGE>(scales), Halved<STORAGE>(scales + 2),
                                         Halved<STORAGE>(scales + 4), Halved<STORAGE>(scales + 6)};
        F sums[4][ROWS] = {};
        for (int d = 0; d < head_size; d += HALVES) {
            __m512bh x[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) x[j] = (__m512bh)keys[j].at(values + j * key.stride, d);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; ++row) {
                const __m512bh q = (__m512bh)_mm512_loadu_si512(query + row * head_size + d);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sums[j][row] = _mm512_dpbf16_ps(sums[j][row], x[j], q);
            }
        }
        for (int row = 0; row < ROWS; ++row) {
            float* out = scores + row * BATCH + i;
            sum4(&sums[0][row], ROWS, out);
            _mm_storeu_ps(out, _mm_mul_ps(_mm_loadu_ps(out), _mm_set1_ps(scale)));
        }
    }
}

// `storage` as Batch has it, `rows` at most ROW_BLOCK.
inline void score_dots(int storage, int rows, const uint16_t* query, const Vectors& key, int n, int head_size,
                       float scale, float* scores, Ahead& ahead) {
    using Kernel = void (*)(const uint16_t*, const Vectors&, int, int, float, float*, Ahead&);
#define SPARSEKV_ROWS(storage) {dot_rows<storage, 1>, dot_rows<storage, 2>, dot_rows<storage, 3>, dot_rows<storage, 4>}
    static constexpr Kernel DENSE_KEYS[] = SPARSEKV_ROWS(BFLOAT16);
    static constexpr Kernel INTEGERS[][ROW_BLOCK] = {SPARSEKV_ROWS(INT4), SPARSEKV_ROWS(INT3), SPARSEKV_ROWS(INT2)};
#undef SPARSEKV_ROWS
    const Kernel kernel =
        storage == BFLOAT16 + WHOLE ? DENSE_KEYS[rows - 1] : INTEGERS[storage - WHOLE - INT4][rows - 1];
    kernel(query, key, n, head_size, scale, scores, ahead);
}

#else

inline bool scores_by_dots(const Layout&) { return false; }

inline void score_dots(int, int, const uint16_t*, const Vectors&, int, int, float, float*, Ahead&) {}

#endif

}  // namespace sparsekv::SPARSEKV_ISA
