// Products of pairs of bfloat16 by dot products in vector registers. See pairs.h.
#pragma once

#include "halves.h"

#if defined(__AVX512BF16__)

namespace sparsekv::SPARSEKV_ISA {

struct Dots {
    static constexpr int PARTS = 2;

    static void begin() {}
    static void end() {}

    // As Tiles::multiply().
    template <int SUMMED>
    static void multiply(const uint16_t* left, int stride, int rows, uint32_t* const (&right)[SUMMED], int depth,
                         float* out, bool accumulate) {
        for (int row = 0; row < rows; row += TILE, left += TILE * stride, out += TILE * TILE) {
            F sums[TILE];
#pragma GCC unroll 16
            for (int i = 0; i < TILE; ++i) sums[i] = accumulate ? load(out + i * TILE) : F{};
            for (int d = 0; d < depth; d += 2)
                for (const uint32_t* part : right) {
                    const __m512bh pairs = (__m512bh)_mm512_loadu_si512(part + d / 2 * TILE);
#pragma GCC unroll 16
                    for (int i = 0; i < TILE; ++i) {
                        int32_t pair;
                        memcpy(&pair, left + i * stride + d, sizeof pair);
                        sums[i] = _mm512_dpbf16_ps(sums[i], pairs, (__m512bh)_mm512_set1_epi32(pair));
                    }
                }
#pragma GCC unroll 16
            for (int i = 0; i < TILE; ++i) store(out + i * TILE, sums[i]);
        }
    }
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
