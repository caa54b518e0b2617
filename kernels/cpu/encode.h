// Survivors as float32 to packed bytes, byte for byte as vllm_sparsekv/codecs.py.
#pragma once

#include "codec.h"

namespace sparsekv {

inline void encode_int4(const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    float smallest = x[0], greatest = x[0];
    for (int i = 1; i < survivors; ++i) {
        // Once a NaN, always a NaN.
        smallest = x[i] < smallest || x[i] != x[i] ? x[i] : smallest;
        greatest = x[i] > greatest || x[i] != x[i] ? x[i] : greatest;
    }
    uint16_t half[2];
    half[0] = float_to_float16(smallest);
    const float low = float16_to_float(half[0]);
    half[1] = float_to_float16((greatest - low) / 15);
    const float step = float16_to_float(half[1]);
    for (int i = 0; i < survivors; i += 2) {
        uint8_t code[2];
        for (int j = 0; j < 2; ++j) {
            float y = (x[i + j] - low) / step;
            y = y > 0 ? y : 0;  // NaN too
            y = y < 15 ? y : 15;
            constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
            code[j] = static_cast<uint8_t>((y + ROUND) - ROUND);
        }
        values[i / 2] = static_cast<uint8_t>(code[0] | code[1] << 4);
    }
    // x - x is 0 unless x is Inf or NaN.
    if (!(low - low == 0 && step - step == 0)) half[0] = 0x7e00;
    memcpy(scales, half, sizeof half);
}

// `survivors` values of one vector.
inline void encode(int storage, const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    if (storage == INT4) return encode_int4(x, survivors, values, scales);
    if (storage != FP8) return encode_row(storage, x, survivors, values);
    for (int i = 0; i < survivors; ++i) values[i] = float_to_fp8(x[i]);
}

}  // namespace sparsekv
