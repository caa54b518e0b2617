// Many fp8 values to bfloat16 at once, which holds all of them.
#pragma once

#include "codec.h"

namespace sparsekv::SPARSEKV_ISA {

#if defined(__AVX2__)
// 32 bytes of either in turn.
inline void store_pairs(__m256i even, __m256i odd, uint8_t* out) {
    const __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
    __m128i* to = (__m128i*)out;
    _mm_storeu_si128(to, _mm256_castsi256_si128(first));
    _mm_storeu_si128(to + 1, _mm256_castsi256_si128(second));
    _mm_storeu_si128(to + 2, _mm256_extracti128_si256(first, 1));
    _mm_storeu_si128(to + 3, _mm256_extracti128_si256(second, 1));
}
#endif

inline bool any_nan(const uint8_t* fp8, int count) {
    uint8_t found = 0;
    for (int i = 0; i < count; ++i) found |= (fp8[i] & 0x7f) == 0x7f;
    return found;
}

// fp8 to bfloat16.
inline void to_bfloat16(const uint8_t* source, int count, uint8_t* out) {
    int i = 0;
#if defined(__AVX2__)
    // The upper byte follows from sign and upper exponent, the lower one is the lower nibble; below
    // the normal range (magnitudes 0 to 7) both are corrected.
    const auto table = [](int64_t low, int64_t high) {
        return _mm256_broadcastsi128_si256(_mm_set_epi64x(high, low));
    };
    const __m256i upper_bytes = table(0x434241403f3e3d3c, 0xc3c2c1c0bfbebdbc);
    const __m256i correct_upper = table(0, 0x000000000707073c);
    const __m256i correct_lower = table(0, 0x10207040f0a01000);
    if (!any_nan(source, count))
        for (; i + 32 <= count; i += 32) {
            const __m256i x = _mm256_loadu_si256((const __m256i*)(source + i));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
            const __m256i low = _mm256_and_si256(_mm256_slli_epi16(x, 4), _mm256_set1_epi8(-16));
            // 8 to 15 for the magnitudes to correct, negative, which looks up 0, for all others.
            const __m256i small =
                _mm256_add_epi8(_mm256_and_si256(x, _mm256_set1_epi8(127)), _mm256_set1_epi8(120));
            const __m256i upper =
                _mm256_xor_si256(_mm256_shuffle_epi8(upper_bytes, high), _mm256_shuffle_epi8(correct_upper, small));
            const __m256i lower = _mm256_xor_si256(low, _mm256_shuffle_epi8(correct_lower, small));
            store_pairs(lower, upper, out + 2 * i);
        }
#endif
    for (; i < count; ++i) {
        const uint16_t x = float_to_bfloat16(fp8_to_float(source[i]));
        memcpy(out + 2 * i, &x, sizeof x);
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
