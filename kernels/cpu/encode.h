// Survivors as float32 to packed bytes, byte for byte as vllm_sparsekv/format/codecs.py.
#pragma once

#include "codec.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer

// A run of integers with one scale: value = step * (code - zero), codes 0 .. largest.
struct IntegerRun {
    float step, zero, largest, gain;

    // 0 for NaN.
    float code(float x) const {
        float y = x * gain / step + zero;
        y = y > 0 ? y : 0;
        return (y < largest ? y : largest) + ROUND - ROUND;
    }
    float value(float code) const { return step * code - step * zero; }
};

// The run of `count` values and the two bytes of its scale.
template <int BITS>
IntegerRun integer_run(const float* x, int count, uint8_t* scale) {
    constexpr float LARGEST = (1 << BITS) - 1, UNITS = 1 << (7 - BITS);
    constexpr float STEPS = BITS == 4 ? 15 : BITS == 3 ? 7.5f : 4, GAIN = BITS == 2 ? 17 / 16.f : 1;
    float low = 0, high = 0;
    for (int i = 0; i < count; ++i) {
        // Once a NaN, always a NaN.
        low = x[i] < low || x[i] != x[i] ? x[i] : low;
        high = x[i] > high || x[i] != x[i] ? x[i] : high;
    }
    uint32_t step_bits = (float_to_float16((high - low) / STEPS) + 0x20u) & 0x7fc0;
    if (step_bits >= 0x7c00) step_bits = 0x7fc0;
    const float step = IntScale::from_bits(static_cast<uint16_t>(step_bits << 1)).step;

    float zero = UNITS * LARGEST / 2 - UNITS / 2 * (low + high) * GAIN / step;
    if (!(zero - zero == 0)) zero = 0;  // Inf or NaN
    zero = zero > 0 ? zero : 0;
    zero = (zero < 127 ? zero : 127) + ROUND - ROUND;
    const uint16_t bits = static_cast<uint16_t>(step_bits << 1 | static_cast<uint32_t>(zero));
    memcpy(scale, &bits, sizeof bits);
    return {step, zero / UNITS, LARGEST, GAIN};
}

// The codes of `target` in the scale of x. `survivors` is a multiple of the codes in as few whole bytes as can be.
template <int BITS>
void encode_integers(const float* x, const float* target, int survivors, uint8_t* values, uint8_t* scales) {
    constexpr int BYTES = BITS == 3 ? 3 : 1, TOGETHER = 8 * BYTES / BITS;
    const IntegerRun run = integer_run<BITS>(x, survivors, scales);
    for (int i = 0; i < survivors; i += TOGETHER, values += BYTES) {
        uint32_t codes = 0;
        for (int j = 0; j < TOGETHER; ++j) codes |= static_cast<uint32_t>(run.code(target[i + j])) << BITS * j;
        memcpy(values, &codes, BYTES);
    }
}

// `survivors` values of one vector; integers are those nearest to `target`.
inline void encode(
    int storage, const float* x, const float* target, int survivors, uint8_t* values, uint8_t* scales) {
    if (storage == INT4) return encode_integers<4>(x, target, survivors, values, scales);
    if (storage == INT3) return encode_integers<3>(x, target, survivors, values, scales);
    if (storage == INT2) return encode_integers<2>(x, target, survivors, values, scales);
    if (storage == INT4_INT2) {
        const int half = survivors / 2;
        encode_integers<4>(x, target, half, values, scales);
        return encode_integers<2>(x + half, target + half, half, values + half / 2, scales + 2);
    }
    if (storage != FP8) return encode_row(storage, x, survivors, values);
    for (int i = 0; i < survivors; ++i) values[i] = float_to_fp8(x[i]);
}

}  // namespace sparsekv::SPARSEKV_ISA
