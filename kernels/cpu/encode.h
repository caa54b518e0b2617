// Survivors as float32 to packed bytes, byte for byte as vllm_sparsekv/format/codecs.py.
#pragma once

#include "codec.h"

namespace sparsekv::SPARSEKV_ISA {

// `survivors` is a multiple of the codes in as few whole bytes as can be.
template <int BITS>
void encode_integers(const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    constexpr float LARGEST = (1 << BITS) - 1, STEPS = BITS == 4 ? LARGEST : LARGEST + 0.5f, UNITS = 1 << (7 - BITS);
    constexpr int BYTES = BITS == 3 ? 3 : 1, TOGETHER = 8 * BYTES / BITS;
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    float low = 0, high = 0;
    for (int i = 0; i < survivors; ++i) {
        // Once a NaN, always a NaN.
        low = x[i] < low || x[i] != x[i] ? x[i] : low;
        high = x[i] > high || x[i] != x[i] ? x[i] : high;
    }
    uint32_t step_bits = (float_to_float16((high - low) / STEPS) + 0x20u) & 0x7fc0;
    if (step_bits >= 0x7c00) step_bits = 0x7fc0;
    const float step = IntScale::from_bits(static_cast<uint16_t>(step_bits << 1)).step;

    float zero = UNITS * LARGEST / 2 - UNITS / 2 * (low + high) / step;
    if (!(zero - zero == 0)) zero = 0;  // Inf or NaN
    zero = zero > 0 ? zero : 0;
    zero = (zero < 127 ? zero : 127) + ROUND - ROUND;
    const uint16_t bits = static_cast<uint16_t>(step_bits << 1 | static_cast<uint32_t>(zero));
    memcpy(scales, &bits, sizeof bits);

    for (int i = 0; i < survivors; i += TOGETHER, values += BYTES) {
        uint32_t codes = 0;
        for (int j = 0; j < TOGETHER; ++j) {
            float y = x[i + j] / step + zero / UNITS;
            y = y > 0 ? y : 0;  // NaN too
            y = (y < LARGEST ? y : LARGEST) + ROUND - ROUND;
            codes |= static_cast<uint32_t>(y) << BITS * j;
        }
        memcpy(values, &codes, BYTES);
    }
}

// `survivors` values of one vector.
inline void encode(int storage, const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    if (storage == INT4) return encode_integers<4>(x, survivors, values, scales);
    if (storage == INT3) return encode_integers<3>(x, survivors, values, scales);
    if (storage == INT2) return encode_integers<2>(x, survivors, values, scales);
    if (storage == INT4_INT2) {
        const int half = survivors / 2;
        encode_integers<4>(x, half, values, scales);
        return encode_integers<2>(x + half, half, values + half / 2, scales + 2);
    }
    if (storage != FP8) return encode_row(storage, x, survivors, values);
    for (int i = 0; i < survivors; ++i) values[i] = float_to_fp8(x[i]);
}

}  // namespace sparsekv::SPARSEKV_ISA
