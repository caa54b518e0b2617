// Vectors of floats for one instruction set, chosen by the flags this file is compiled with.
//
// Arithmetic is GCC's vector extension; only what it cannot say is written per instruction set.
// One binary holds all sets (build.py). Each has a namespace of its own, so that the linker never
// takes an inline function compiled for one set into another; for the same reason nothing here calls
// inline functions of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#define SPARSEKV_ISA amx
#elif defined(__AVX512BF16__)
#define SPARSEKV_ISA avx512_bf16
#elif defined(__AVX512F__)
#define SPARSEKV_ISA avx512
#elif defined(__AVX2__)
#define SPARSEKV_ISA avx2
#else
#define SPARSEKV_ISA portable
#endif

namespace sparsekv::SPARSEKV_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint16_t Word __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));
typedef float UnalignedF __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline F load(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }
inline void store(float* p, F x) { *reinterpret_cast<UnalignedF*>(p) = x; }
// As many of the lanes as there are elements, the others 0.
inline F load_first(const float* p, int count) {
    if (count >= LANES) return load(p);
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), p);
#else
    F x{};
    memcpy(&x, p, count * sizeof(float));
    return x;
#endif
}
inline void store_first(float* p, F x, int count) {
    if (count >= LANES) return store(p, x);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1 << count) - 1), x);
#else
    memcpy(p, &x, count * sizeof(float));
#endif
}
inline F broadcast(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return F{x, x, x, x, x, x, x, x};
#endif
}
// sum += x * y, in registers: the compiler would copy sums around and repeat the loads of y.
inline void add_product(F& sum, F x, F y) {
#if defined(__AVX2__)
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
#else
    sum += x * y;
#endif
}
inline F bits_to_float(I x) { return reinterpret_cast<F>(x); }
inline I float_to_bits(F x) { return reinterpret_cast<I>(x); }
inline I lane_numbers() {
#if defined(__AVX512F__)
    return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
    return I{0, 1, 2, 3, 4, 5, 6, 7};
#endif
}
// A NaN in either operand may be lost; softmax recovers it from the exponential.
inline F max(F a, F b) { return a > b ? a : b; }

constexpr float LOG2_E = 1.44269504088896341f;

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

#if defined(__AVX2__)
inline __m256 fold(F x) {
#if defined(__AVX512F__)
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    return x;
#endif
}
#endif

// out[i] = sum of the lanes of x[i * stride], i < 4.
inline void sum4(const F* x, int stride, float* out) {
#if defined(__AVX2__)
    const __m256 low = _mm256_hadd_ps(fold(x[0]), fold(x[stride]));
    const __m256 high = _mm256_hadd_ps(fold(x[2 * stride]), fold(x[3 * stride]));
    const __m256 sums = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
    for (int i = 0; i < 4; ++i) {
        float lane[LANES];
        store(lane, x[i * stride]);
        for (int width = LANES / 2; width; width /= 2)
            for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
        out[i] = lane[0];
    }
#endif
}

#if defined(__AVX512F__)
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
inline float largest(F x) { return _mm512_reduce_max_ps(x); }
#else
// Both halves of the lanes together, again and again.
template <class Together>
inline float reduce(F x, Together together) {
    float lane[LANES];
    store(lane, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int j = 0; j < width; ++j) lane[j] = together(lane[j], lane[j + width]);
    return lane[0];
}
inline float sum(F x) {
    return reduce(x, [](float a, float b) { return a + b; });
}
inline float largest(F x) {
    return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
#endif

// 2^x for x <= 0, relative error below 1e-7; 0 below -126, NaN stays NaN. Nothing here underflows, which
// costs some processors hundreds of cycles.
inline F exp2(F x) {
#if defined(__AVX512F__)
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
    const F integer = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F f = x - integer;
#else
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    const F shifted = x + ROUND;
    const F f = x - (shifted - ROUND);
#endif
    F p = f * 1.546144746e-4f + 1.339086714e-3f;
    p = p * f + 9.618056670e-3f;
    p = p * f + 5.550357104e-2f;
    p = p * f + 2.402265092e-1f;
    p = p * f + 6.931471880e-1f;
    p = p * f + 1.f;
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(normal, p, integer);
#else
    // The lowest 9 bits of ROUND are 0, so that those of `shifted` are the integer's.
    return x < -126.f ? F{} : p * bits_to_float((float_to_bits(shifted) + 127) << 23);
#endif
}

// Relative error below 2e-7, NaN stays NaN.
inline F tanh(F x) {
    const F square = x * x;
    F p = square * 1.725699008e-2f - 5.305295030e-2f;
    p = p * square + 1.332598729e-1f;
    p = p * square - 3.333314838e-1f;
    const I sign = float_to_bits(x) & INT32_MIN;
    const F magnitude = bits_to_float(float_to_bits(x) ^ sign);
    const F power = exp2(magnitude * (-2.f * LOG2_E));
    const F large = bits_to_float(float_to_bits((1.f - power) / (1.f + power)) | sign);
    return magnitude < 0.5f ? x + x * square * p : large;  // the quotient would cancel
}

}  // namespace sparsekv::SPARSEKV_ISA
