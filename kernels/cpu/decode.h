// Packed survivors and dense rows to float32, a run of vectors at a time.
#pragma once

#include "codec.h"

namespace sparsekv {

// 16 values from the memory at p; `storage` is a compile-time constant.
template <int STORAGE>
inline void decode16(const uint8_t* p, float* out) {
    if constexpr (STORAGE == FLOAT32) {
        memcpy(out, p, 64);
    } else if constexpr (STORAGE == BFLOAT16) {
        for (int i = 0; i < 16; ++i) {
            uint16_t x;
            memcpy(&x, p + 2 * i, 2);
            out[i] = bfloat16_to_float(x);
        }
    } else if constexpr (STORAGE == FLOAT16) {
#if defined(__AVX2__)
        for (int i = 0; i < 16; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 2 * i))));
#else
        for (int i = 0; i < 16; ++i) {
            uint16_t x;
            memcpy(&x, p + 2 * i, 2);
            out[i] = float16_to_float(x);
        }
#endif
    } else {
        static_assert(STORAGE == FP8);
#if defined(__AVX2__)
        const __m128i byte = _mm_loadu_si128((const __m128i*)p);
        const __m128i nan = _mm_cmpeq_epi8(_mm_and_si128(byte, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
        if (__builtin_expect(_mm_testz_si128(nan, nan), 1)) {
            // Sign, exponent and mantissa as those of a float16 that is 2^8 too small.
            const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(byte), 8);
            const __m256i half = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16((short)0xbfff));
            const __m256 low8 = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            const __m256 high8 = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
            _mm256_storeu_ps(out, _mm256_mul_ps(low8, _mm256_set1_ps(256.f)));
            _mm256_storeu_ps(out + 8, _mm256_mul_ps(high8, _mm256_set1_ps(256.f)));
            return;
        }
#endif
        for (int i = 0; i < 16; ++i) out[i] = fp8_to_float(p[i]);
    }
}

template <int STORAGE>
inline void decode_flat(const uint8_t* p, int64_t count, float* out) {
    constexpr int BYTES = STORAGE == FLOAT32 ? 4 : STORAGE == FP8 ? 1 : 2;
    for (; count >= 16; count -= 16, p += 16 * BYTES, out += 16) decode16<STORAGE>(p, out);
    if (count) {
        uint8_t rest[16 * BYTES] = {};
        memcpy(rest, p, count * BYTES);
        decode16<STORAGE>(rest, out);
    }
}

// The encoding of int4 scales (codecs.Int4Codec): value = low + step * code.
struct Int4Scale {
    float low, step;
    explicit Int4Scale(const uint8_t* scales) {
        uint16_t half[2];
        memcpy(half, scales, 4);
        low = float16_to_float(half[0]);
        step = float16_to_float(half[1]);
    }
};

inline void decode_int4(const uint8_t* p, const uint8_t* scales, int vectors, int survivors, float* out) {
    for (int v = 0; v < vectors; ++v, p += survivors / 2, scales += scale_bytes(INT4), out += survivors) {
        const Int4Scale scale(scales);
        for (int i = 0; i < survivors; i += 16) {
            uint8_t bytes[8] = {};
            const int rest = (survivors - i) / 2;
            memcpy(bytes, p + i / 2, rest < 8 ? rest : 8);
#if defined(__AVX2__)
            const __m128i low = _mm_loadl_epi64((const __m128i*)bytes);
            const __m128i both = _mm_and_si128(_mm_unpacklo_epi8(low, _mm_srli_epi16(low, 4)), _mm_set1_epi8(15));
            const __m256 step = _mm256_set1_ps(scale.step), base = _mm256_set1_ps(scale.low);
            const __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both));
            const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8)));
            _mm256_storeu_ps(out + i, _mm256_fmadd_ps(a, step, base));
            _mm256_storeu_ps(out + i + 8, _mm256_fmadd_ps(b, step, base));
#else
            for (int j = 0; j < 8; ++j) {
                out[i + 2 * j] = scale.low + scale.step * (bytes[j] & 15);
                out[i + 2 * j + 1] = scale.low + scale.step * (bytes[j] >> 4);
            }
#endif
        }
    }
}

// `vectors` runs of `survivors` values (a multiple of 4) to contiguous float32. Writes up to 16
// floats past the end of `out`, reads nothing past the end of its inputs.
inline void decode(
    int storage, const uint8_t* values, const uint8_t* scales, int vectors, int survivors, float* out) {
    const int64_t count = int64_t(vectors) * survivors;
    switch (storage) {
        case FLOAT32: return decode_flat<FLOAT32>(values, count, out);
        case BFLOAT16: return decode_flat<BFLOAT16>(values, count, out);
        case FLOAT16: return decode_flat<FLOAT16>(values, count, out);
        case FP8: return decode_flat<FP8>(values, count, out);
        default: return decode_int4(values, scales, vectors, survivors, out);
    }
}

}  // namespace sparsekv
