// Survivors as float32 to packed bytes, byte for byte as vllm_sparsekv/format/codecs.py.
#pragma once

#include "codec.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer

// A run of integers with one scale: value = step * (code - zero), codes 0 .. largest.
struct IntegerRun {
    float step, zero, largest, gain;
    uint16_t scale;  // as it is stored

    // 0 for NaN.
    F code(F x) const {
        F y = x * gain / step + zero;
        y = y > 0.f ? y : F{};
        return (y < largest ? y : broadcast(largest)) + ROUND - ROUND;
    }
    F value(F code) const { return step * code - step * zero; }
};

// The run of `count` values.
template <int BITS>
IntegerRun integer_run(const float* x, int count) {
    constexpr float LARGEST = (1 << BITS) - 1, UNITS = 1 << (7 - BITS);
    constexpr float STEPS = BITS == 4 ? 15 : BITS == 3 ? 7.5f : 4, GAIN = BITS == 2 ? 17 / 16.f : 1;
    F lowest{}, highest{}, unbounded{};  // the last is NaN where there is an Inf or a NaN
    for (int i = 0; i < count; i += LANES) {
        const F y = load_first(x + i, count - i);
        lowest = y < lowest ? y : lowest;
        highest = y > highest ? y : highest;
        unbounded += y * 0.f;
    }
    const float nan = sum(unbounded), low = nan - largest(-lowest), high = nan + largest(highest);
    uint32_t step_bits = (float_to_float16((high - low) / STEPS) + 0x20u) & 0x7fc0;
    if (step_bits >= 0x7c00) step_bits = 0x7fc0;
    const float step = IntScale::from_bits(static_cast<uint16_t>(step_bits << 1)).step;

    float zero = UNITS * LARGEST / 2 - UNITS / 2 * (low + high) * GAIN / step;
    if (!(zero - zero == 0)) zero = 0;  // Inf or NaN
    zero = zero > 0 ? zero : 0;
    zero = (zero < 127 ? zero : 127) + ROUND - ROUND;
    return {step, zero / UNITS, LARGEST, GAIN, static_cast<uint16_t>(step_bits << 1 | static_cast<uint32_t>(zero))};
}

// The runs of one vector: two of INT4_INT2, else one.
inline int integer_runs(int storage, const float* x, int survivors, IntegerRun* runs) {
    switch (storage) {
        case INT4: runs[0] = integer_run<4>(x, survivors); return 1;
        case INT3: runs[0] = integer_run<3>(x, survivors); return 1;
        case INT2: runs[0] = integer_run<2>(x, survivors); return 1;
    }
    runs[0] = integer_run<4>(x, survivors / 2);
    runs[1] = integer_run<2>(x + survivors / 2, survivors / 2);
    return 2;
}

// The lower BITS of 8 bytes, side by side.
template <int BITS>
uint64_t join_codes(uint64_t bytes) {
    constexpr uint64_t KEPT = 0x0101010101010101u * ((1 << BITS) - 1);
#if defined(__BMI2__)
    return _pext_u64(bytes, KEPT);
#else
    uint64_t joined = 0;
    for (int i = 0; i < 8; ++i) joined |= (bytes & KEPT) >> 8 * i << BITS * i & uint64_t((1 << BITS) - 1) << BITS * i;
    return joined;
#endif
}

// The codes of `count` values, a multiple of those in as few whole bytes as can be.
template <int BITS>
void encode_integers(const IntegerRun& run, const float* x, int count, uint8_t* values) {
    for (int i = 0; i < count; i += LANES) {
        const int left = count - i < LANES ? count - i : LANES;
        const I codes = __builtin_convertvector(run.code(load_first(x + i, left)), I);
        const Bytes bytes = __builtin_convertvector(codes, Bytes);
        for (int j = 0; j < left; j += 8, values += BITS) {
            uint64_t eight;
            memcpy(&eight, reinterpret_cast<const uint8_t*>(&bytes) + j, sizeof eight);
            const uint64_t joined = join_codes<BITS>(eight);
            memcpy(values, &joined, left - j >= 8 ? BITS : (left - j) * BITS / 8);
        }
    }
}

inline void encode_run(int bits, const IntegerRun& run, const float* x, int count, uint8_t* values, uint8_t* scale) {
    if (bits == 4) encode_integers<4>(run, x, count, values);
    else if (bits == 3) encode_integers<3>(run, x, count, values);
    else encode_integers<2>(run, x, count, values);
    memcpy(scale, &run.scale, sizeof run.scale);
}

// The integers of these runs nearest to `survivors` values of one vector.
inline void encode_runs(
    int storage, const IntegerRun* runs, const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    if (storage != INT4_INT2) return encode_run(storage_bits(storage), runs[0], x, survivors, values, scales);
    const int half = survivors / 2;
    encode_run(4, runs[0], x, half, values, scales);
    encode_run(2, runs[1], x + half, half, values + half / 2, scales + 2);
}

// `survivors` values of one vector.
inline void encode(int storage, const float* x, int survivors, uint8_t* values, uint8_t* scales) {
    if (is_integer(storage)) {
        IntegerRun runs[2];
        integer_runs(storage, x, survivors, runs);
        return encode_runs(storage, runs, x, survivors, values, scales);
    }
    if (storage != FP8) return encode_row(storage, x, survivors, values);
    for (int i = 0; i < survivors; ++i) values[i] = float_to_fp8(x[i]);
}

// `count` values of one vector as vllm_sparsekv/format/window.py has them; returns the step.
inline uint16_t encode_int8(const float* x, int count, int8_t* codes) {
    constexpr float LARGEST = 127;
    F highest{}, unbounded{};  // the latter is NaN where there is an Inf or a NaN
    for (int i = 0; i < count; i += LANES) {
        const F y = load(x + i), magnitude = y < 0.f ? -y : y;
        highest = magnitude > highest ? magnitude : highest;
        unbounded += y * 0.f;
    }
    uint32_t bits = bit_cast<uint32_t>(largest(highest) / LARGEST);
    if (sum(unbounded) != 0) bits = 0x7fc00000;  // NaN
    const F step = broadcast(bit_cast<float>(bits & 0xffff0000u)), limit = broadcast(LARGEST);
    for (int i = 0; i < count; i += LANES) {
        F y = load(x + i) / step;
        y = y - y == 0.f ? y : F{};
        y = y > limit ? limit : y < -limit ? -limit : y;
        const SignedBytes some = __builtin_convertvector(__builtin_convertvector(y + ROUND - ROUND, I), SignedBytes);
        memcpy(codes + i, &some, sizeof some);
    }
    return static_cast<uint16_t>(bits >> 16);
}

}  // namespace sparsekv::SPARSEKV_ISA
