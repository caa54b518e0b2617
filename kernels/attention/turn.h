// Blocks of 32 bits, turned, and rows of 16 bits, paired.
#pragma once

#include "../cpu/simd.h"

#if defined(__AVX512F__)

namespace sparsekv::SPARSEKV_ISA {

constexpr int TILE = 16;  // rows that are multiplied together, and words of a register

// Rows become columns.
inline void turn16(__m512i (&a)[16]) {
    __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
        // a[4 i + j] has columns j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), high = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
        a[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        a[j + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
        a[j + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        a[j + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

// Each 4 x 4 block that takes the same 128 bits.
inline void turn4(__m512i (&a)[4]) {
    const __m512i low = _mm512_unpacklo_epi32(a[0], a[1]), high = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i low2 = _mm512_unpacklo_epi32(a[2], a[3]), high2 = _mm512_unpackhi_epi32(a[2], a[3]);
    a[0] = _mm512_unpacklo_epi64(low, low2);
    a[1] = _mm512_unpackhi_epi64(low, low2);
    a[2] = _mm512_unpacklo_epi64(high, high2);
    a[3] = _mm512_unpackhi_epi64(high, high2);
}

// Of memory; strides count elements.
inline void turn16(const void* rows, int stride, void* out, int out_stride) {
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const int32_t*>(rows) + i * stride);
    turn16(a);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<int32_t*>(out) + i * out_stride, a[i]);
}

// Pairs of the 32 elements of two rows: `low` has those of element paired_element(i) in lane i, `high` those
// 4 elements on.
inline void pair_rows(const uint16_t* even, const uint16_t* odd, __m512i& low, __m512i& high) {
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    low = _mm512_unpacklo_epi16(a, b);
    high = _mm512_unpackhi_epi16(a, b);
}
constexpr int paired_element(int lane) { return lane / 4 * 8 + lane % 4; }

}  // namespace sparsekv::SPARSEKV_ISA

#endif
