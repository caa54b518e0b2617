// Survivors as float32 to packed bytes, byte for byte as vllm_sparsekv/codecs.py.
#pragma once

#include "codec.h"

namespace sparsekv {

inline void encode_int4(const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    float low = 0, high = 0;
    for (int i = 0; i < survivors; ++i) {
        // Once a NaN, always a NaN.
        low = x[i] < low || x[i] != x[i] ? x[i] : low;
        high = x[i] > high || x[i] != x[i] ? x[i] : high;
    }
    uint32_t step_bits = (float_to_float16((high - low) / 15) + 0x20u) & 0x7fc0;
    if (step_bits >= 0x7c00) step_bits = 0x7fc0;
    const float step = Int4Scale::from_bits(static_cast<uint16_t>(step_bits << 1)).step;

    float zero = 60 - 4 * (low + high) / step;
    if (!(zero - zero == 0)) zero = 0;  // Inf or NaN
    zero = zero > 0 ? zero : 0;
    zero = (zero < 127 ? zero : 127) + ROUND - ROUND;
    const uint16_t bits = static_cast<uint16_t>(step_bits << 1 | static_cast<uint32_t>(zero));
    memcpy(scales, &bits, sizeof bits);

    for (int i = 0; i < survivors; i += 2) {
        uint8_t code[2];
        for (int j = 0; j < 2; ++j) {
            float y = x[i + j] / step + zero / 8;
            y = y > 0 ? y : 0;  // NaN too
            y = (y < 15 ? y : 15) + ROUND - ROUND;
            code[j] = static_cast<uint8_t>(y);
        }
        values[i / 2] = static_cast<uint8_t>(code[0] | code[1] << 4);
    }
}

// `survivors` values of one vector.
inline void encode(int storage, const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    if (storage == INT4) return encode_int4(x, survivors, values, scales);
    if (storage != FP8) return encode_row(storage, x, survivors, values);
    for (int i = 0; i < survivors; ++i) values[i] = float_to_fp8(x[i]);
}

}  // namespace sparsekv
