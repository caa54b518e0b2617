// Element storage: model dtypes and the survivors' codecs (vllm_sparsekv/format/codecs.py), as float32.
#pragma once

#include "simd.h"

namespace sparsekv::SPARSEKV_ISA {

// The numbers are those of STORAGE in kernels/cpu/calls.py.
enum Storage : int32_t {
    FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FP8 = 3, INT4 = 4, INT3 = 5, INT2 = 6, INT4_INT2 = 7
};

constexpr int storage_bits(int storage) {
    constexpr int BITS[] = {32, 16, 16, 8, 4, 3, 2, 3};
    return BITS[storage];
}
inline bool is_integer(int storage) { return storage >= INT4; }
inline int scale_bytes(int storage) { return storage == INT4_INT2 ? 4 : is_integer(storage) ? 2 : 0; }

template <class To, class From>
inline To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

inline float bfloat16_to_float(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }

// Both small formats share one scheme: move exponent and mantissa into place, change the bias, and
// let a subtraction normalise what was subnormal.
inline float float16_to_float(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    uint32_t bits = uint32_t(x & 0x7fff) << 13;
    const uint32_t exponent = bits & 0x0f800000;
    bits += 112u << 23;
    if (exponent == 0x0f800000) bits += 112u << 23;
    if (exponent == 0) bits = bit_cast<uint32_t>(bit_cast<float>(bits + (1u << 23)) - 0x1p-14f);
    return bit_cast<float>(bits | uint32_t(x & 0x8000) << 16);
#endif
}

struct Float16 {
    uint16_t bits;
};

inline F load(const Float16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    F out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = float16_to_float(p[lane].bits);
    return out;
#endif
}

inline float fp8_to_float(uint8_t x) {
    uint32_t bits = (uint32_t(x & 0x7f) << 20) + (120u << 23);
    if ((x & 0x7f) == 0x7f) bits = 0x7fc00000;
    if ((x & 0x78) == 0) bits = bit_cast<uint32_t>(bit_cast<float>(bits + (1u << 23)) - 0x1p-6f);
    return bit_cast<float>(bits | uint32_t(x & 0x80) << 24);
}

// Round to nearest even a float to `mantissa` bits with the given least normal exponent.
inline uint32_t round_bits(uint32_t magnitude, int mantissa, int bias) {
    const int drop = 23 - mantissa;
    const uint32_t least_normal = uint32_t(128 - bias) << 23;
    if (magnitude < least_normal) {
        // Adding 2^(23 - ...) makes the FPU round at the last bit of the subnormal range.
        const float magic = bit_cast<float>(least_normal + (uint32_t(drop) << 23));
        return bit_cast<uint32_t>(bit_cast<float>(magnitude) + magic) - bit_cast<uint32_t>(magic);
    }
    const uint32_t odd = magnitude >> drop & 1;
    return (magnitude - (uint32_t(127 - bias) << 23) + (1u << (drop - 1)) - 1 + odd) >> drop;
}

inline uint16_t float_to_float16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
    uint32_t out = magnitude > 0x7f800000    ? 0x7e00
                   : magnitude >= 0x477ff000 ? 0x7c00
                                             : round_bits(magnitude, 10, 15);
    return static_cast<uint16_t>(out | bits >> 31 << 15);
}

// The value at p, of any storage that is a whole number of bytes.
inline float one_value(int storage, const uint8_t* p) {
    if (storage == FP8) return fp8_to_float(*p);
    if (storage == FLOAT32) {
        float x;
        memcpy(&x, p, 4);
        return x;
    }
    uint16_t x;
    memcpy(&x, p, 2);
    return storage == BFLOAT16 ? bfloat16_to_float(x) : float16_to_float(x);
}

inline uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Saturates finite values at +-448; Inf and NaN become NaN.
inline uint8_t float_to_fp8(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
    if (magnitude == 0x7f800000) return 0x7f;
    uint32_t out = magnitude > 0x7f800000 ? 0x7f
                   : magnitude > 0x43e00000 ? 0x7e
                                            : round_bits(magnitude, 3, 7);
    return static_cast<uint8_t>(out | bits >> 31 << 7);
}

// The scale of an integer vector (codecs.IntCodec): value = step * (code - zero * 2^(bits - 7)). As
// integers in eighths of a step, 8 * code - zero, survivors of int4 fit a signed byte.
struct IntScale {
    float step;  // NaN for a vector that holds one
    int zero;

    static IntScale from_bits(uint16_t bits) {
        return {float16_to_float(bits >> 1 & 0x7fc0), bits & 127};
    }
    static IntScale read(const uint8_t* scale) {
        uint16_t bits;
        memcpy(&bits, scale, sizeof bits);
        return from_bits(bits);
    }
};

// The scales of `count` integer vectors: steps times `unit`, and the codes of value 0. Returns
// whether any step is NaN.
inline bool decode_scales(
    int storage, const uint8_t* scales, int count, float unit, float* steps, float* zeros) {
    const float zero_unit = 1.f / (1 << (7 - storage_bits(storage)));
    bool has_nan = false;
    int i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8) {
        const __m128i bits = _mm_loadu_si128((const __m128i*)(scales + 2 * i));
        const __m256 step = _mm256_cvtph_ps(_mm_and_si128(_mm_srli_epi16(bits, 1), _mm_set1_epi16(0x7fc0)));
        const __m256i zero = _mm256_cvtepu16_epi32(_mm_and_si128(bits, _mm_set1_epi16(127)));
        _mm256_storeu_ps(steps + i, _mm256_mul_ps(step, _mm256_set1_ps(unit)));
        _mm256_storeu_ps(zeros + i, _mm256_mul_ps(_mm256_cvtepi32_ps(zero), _mm256_set1_ps(zero_unit)));
        has_nan |= _mm256_movemask_ps(_mm256_cmp_ps(step, step, _CMP_UNORD_Q)) != 0;
    }
#endif
    for (; i < count; ++i) {
        const IntScale scale = IntScale::read(scales + 2 * i);
        steps[i] = scale.step * unit;
        zeros[i] = scale.zero * zero_unit;
        has_nan |= scale.step != scale.step;
    }
    return has_nan;
}

// A row of the model dtype to float32; `size` is a multiple of 16.
inline void decode_row(int storage, const uint8_t* row, int size, float* out) {
    if (storage == FLOAT32) {
        memcpy(out, row, size * sizeof(float));
        return;
    }
#if defined(__AVX2__)
    for (int i = 0; i < size; i += 8) {
        const __m128i half = _mm_loadu_si128((const __m128i*)(row + 2 * i));
        const __m256 wide = storage == FLOAT16
                                ? _mm256_cvtph_ps(half)
                                : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        _mm256_storeu_ps(out + i, wide);
    }
#else
    for (int i = 0; i < size; ++i) out[i] = one_value(storage, row + 2 * i);
#endif
}

// A row of float32 to the model dtype.
inline void encode_row(int storage, const float* x, int size, uint8_t* out) {
    if (storage == FLOAT32) {
        memcpy(out, x, size * sizeof(float));
        return;
    }
    int i = 0;
    if (storage == BFLOAT16) {
        for (; i + LANES <= size; i += LANES) {
            const I bits = float_to_bits(load(x + i)), upper = bits >> 16;
            const I rounded = (bits + 0x7fff + (upper & 1)) >> 16, nan = upper | 0x40;
            const Word halves = __builtin_convertvector((bits & INT32_MAX) > 0x7f800000 ? nan : rounded, Word);
            memcpy(out + 2 * i, &halves, sizeof halves);
        }
    } else {
#if defined(__AVX2__)
        for (; i + 8 <= size; i += 8) {
            const __m256 y = _mm256_loadu_ps(x + i);
            if (_mm256_movemask_ps(_mm256_cmp_ps(y, y, _CMP_UNORD_Q))) break;  // of NaNs there is one
            _mm_storeu_si128((__m128i*)(out + 2 * i), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
        }
#endif
    }
    for (; i < size; ++i) {
        const uint16_t y = storage == BFLOAT16 ? float_to_bfloat16(x[i]) : float_to_float16(x[i]);
        memcpy(out + 2 * i, &y, 2);
    }
}

// The next LANES of int8.
inline F load_codes(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    F out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = p[lane];
    return out;
#endif
}

// A row of int8 to the model dtype, which holds it without loss; `size` is a multiple of 16.
inline void convert_codes(const int8_t* codes, int size, int storage, uint8_t* out) {
    if (storage == BFLOAT16) {
        for (int i = 0; i < size; i += LANES) {
            const I upper = float_to_bits(load_codes(codes + i)) >> 16;
#if defined(__AVX512F__)
            _mm256_storeu_si256((__m256i*)(out + 2 * i), _mm512_cvtepi32_epi16((__m512i)upper));
#else
            const Word halves = __builtin_convertvector(upper, Word);
            memcpy(out + 2 * i, &halves, sizeof halves);
#endif
        }
        return;
    }
    for (int i = 0; i < size; i += LANES) {
        float wide[LANES];
        store(wide, load_codes(codes + i));
        encode_row(storage, wide, LANES, out + i * storage_bits(storage) / 8);
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
