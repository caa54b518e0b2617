// From a bitmap and packed survivors to lanes of float32.
//
// In working memory survivors keep the form of their page, except that fp8 becomes bfloat16 and int4
// takes a signed byte each (IntScale). AVX2 has no expand instruction; tables indexed by a bitmap byte hold the byte shuffle that
// moves the next survivors to their lanes, which often converts them at the same time.
#pragma once

#include "codec.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int survivor_bytes(int storage) { return storage == FLOAT32 ? 4 : storage == INT4 ? 1 : 2; }

#if defined(__AVX512F__)
using Bits = uint16_t;
#else
using Bits = uint8_t;
#endif

// As a wide integer, which indexes tables without further conversions.
inline uint64_t load_bits(const uint8_t* bitmap) {
    Bits bits;
    memcpy(&bits, bitmap, sizeof bits);
    return bits;
}

inline uint64_t count_bits(uint64_t& bits) {
#if defined(__AVX2__)
    uint64_t count;  // "changing" `bits` keeps the compiler from copying it
    asm("popcntq %1, %0" : "=r"(count), "+r"(bits));
    return count;
#else
    return __builtin_popcountll(bits);
#endif
}

#if defined(__AVX512F__)
#elif defined(__AVX2__)
// For each bitmap byte the byte shuffle of 8 lanes of LANE bytes: WIDTH bytes of a survivor go to
// offset AT of its lane, zeros elsewhere. 32-byte results select from one 16-byte load in both halves.
template <int LANE, int WIDTH, int AT>
struct Shuffles {
    alignas(64) int8_t table[256][8 * LANE];
    constexpr Shuffles() : table{} {
        for (int bits = 0; bits < 256; ++bits)
            for (int lane = 0, rank = 0; lane < 8; ++lane) {
                for (int i = 0; i < LANE; ++i) table[bits][lane * LANE + i] = -128;
                if (!(bits >> lane & 1)) continue;
                for (int i = 0; i < WIDTH; ++i)
                    table[bits][lane * LANE + AT + i] = static_cast<int8_t>(rank * WIDTH + i);
                ++rank;
            }
    }
    __m128i half(uint64_t bits) const { return _mm_load_si128((const __m128i*)table[bits]); }
    __m256i full(uint64_t bits) const { return _mm256_load_si256((const __m256i*)table[bits]); }
};
inline constexpr Shuffles<1, 1, 0> TO_LANE;         // which survivor, negative for none
inline constexpr Shuffles<4, 2, 2> BF16_TO_FLOAT;   // into the upper half
inline constexpr Shuffles<2, 2, 0> FP16_TO_FP16;
inline constexpr Shuffles<4, 1, 3> BYTE_TO_INT32;   // into the upper byte
#endif

// What expand() leaves out for int4: its result counts in this unit, times step / 8.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr float INT4_UNIT = 0x1p-24f;
#else
constexpr float INT4_UNIT = 1.f;
#endif

// The next survivors at p, each in the lane whose bit is set, 0 elsewhere. May read 64 bytes.
template <int STORAGE>
inline F expand(const uint8_t* p, uint64_t bits) {
#if defined(__AVX512F__)
    if constexpr (STORAGE == FLOAT32) {
        return _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(p));
    } else if constexpr (STORAGE == BFLOAT16 || STORAGE == FLOAT16) {
        const __m256i half = _mm256_maskz_expand_epi16(bits, _mm256_loadu_si256((const __m256i*)p));
        if constexpr (STORAGE == FLOAT16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    } else {
        const __m128i byte = _mm_maskz_expand_epi8(bits, _mm_loadu_si128((const __m128i*)p));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte));
    }
#elif defined(__AVX2__)
    if constexpr (STORAGE == FLOAT32) {
        const __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)TO_LANE.table[bits]));
        __m256 next = _mm256_loadu_ps((const float*)p), zero;
        // vpermps is slower with a memory operand; and the compiler would make two instructions of
        // a blend with a zero it knows.
        asm("" : "+x"(next));
        asm("vxorps %0, %0, %0" : "=x"(zero));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(next, lane), zero, _mm256_castsi256_ps(lane));
    } else if constexpr (STORAGE == BFLOAT16) {
        const __m256i next = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(next, BF16_TO_FLOAT.full(bits)));
    } else if constexpr (STORAGE == FLOAT16) {
        const __m128i next = _mm_loadu_si128((const __m128i*)p);
        return _mm256_cvtph_ps(_mm_shuffle_epi8(next, FP16_TO_FP16.half(bits)));
    } else {
        const __m256i next = _mm256_castpd_si256(_mm256_broadcast_sd((const double*)p));
        return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(next, BYTE_TO_INT32.full(bits)));
    }
#else
    F out{};
    for (int lane = 0, rank = 0; lane < LANES; ++lane) {
        if (!(bits >> lane & 1)) continue;
        const uint8_t* survivor = p + survivor_bytes(STORAGE) * rank++;
        out[lane] = STORAGE == INT4 ? static_cast<int8_t>(*survivor) : one_value(STORAGE, survivor);
    }
    return out;
#endif
}

// The next LANES numbers of 16 bits at p.
template <int STORAGE>
inline F load_halves(const uint8_t* p) {
    if constexpr (STORAGE == FLOAT16) return load(reinterpret_cast<const Float16*>(p));
#if defined(__AVX512F__)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#elif defined(__AVX2__)
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#else
    Word halves;
    memcpy(&halves, p, sizeof halves);
    return bits_to_float(__builtin_convertvector(halves, I) << 16);
#endif
}

// The next LANES codes at p, a stream of BITS bits each. May read 2 bytes more.
template <int BITS>
inline F spread_codes(const uint8_t* p);

template <>
inline F spread_codes<2>(const uint8_t* p) {
    int32_t codes;
    memcpy(&codes, p, sizeof codes);
    const I words = I{} + codes;
#if defined(__AVX512F__)
    constexpr I SHIFT = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#else
    constexpr I SHIFT = {0, 2, 4, 6, 8, 10, 12, 14};
#endif
    return __builtin_convertvector(words >> SHIFT & 3, F);
}

template <>
inline F spread_codes<3>(const uint8_t* p) {
    int32_t codes[LANES / 8];
    for (int i = 0; i < LANES / 8; ++i) memcpy(codes + i, p + 3 * i, sizeof(int32_t));
#if defined(__AVX512F__)
    const I words = (I)_mm512_inserti32x8(_mm512_set1_epi32(codes[0]), _mm256_set1_epi32(codes[1]), 1);
    constexpr I SHIFT = {0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21};
#else
    const I words = I{} + codes[0];
    constexpr I SHIFT = {0, 3, 6, 9, 12, 15, 18, 21};
#endif
    return __builtin_convertvector(words >> SHIFT & 7, F);
}

template <>
inline F spread_codes<4>(const uint8_t* p) {
#if defined(__AVX512F__)
    const __m128i pairs = _mm_loadl_epi64((const __m128i*)p);
    const I bytes = (I)_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(pairs, pairs));
    constexpr I SHIFT = {0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4};
#else
    int32_t codes;
    memcpy(&codes, p, sizeof codes);
    const I bytes = I{} + codes;
    constexpr I SHIFT = {0, 4, 8, 12, 16, 20, 24, 28};
#endif
    return __builtin_convertvector(bytes >> SHIFT & 15, F);
}

}  // namespace sparsekv::SPARSEKV_ISA
