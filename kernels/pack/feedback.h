// Rounding errors passed on to later elements of a vector (vllm_sparsekv/format/feedback.py).
#pragma once

#include "../attention/matrix.h"
#include "../cpu/encode.h"
#include "../cpu/scratch.h"

namespace sparsekv::SPARSEKV_ISA {

// Mirrors calls.Feedback.
struct Feedback {
    const Float16* matrix;  // (num_kv_heads, head_size, head_size), or nullptr
    int64_t stride;
    int32_t length;  // elements rounded together
};

// The runs of one whole vector: two of INT4_INT2, else one.
inline int integer_runs(int storage, const float* x, int size, IntegerRun* runs) {
    uint8_t scale[2];
    switch (storage) {
        case INT4: runs[0] = integer_run<4>(x, size, scale); return 1;
        case INT3: runs[0] = integer_run<3>(x, size, scale); return 1;
        case INT2: runs[0] = integer_run<2>(x, size, scale); return 1;
    }
    runs[0] = integer_run<4>(x, size / 2, scale);
    runs[1] = integer_run<2>(x + size / 2, size / 2, scale);
    return 2;
}

// What `count` rows x of one KV head are to be rounded at.
inline void feed_back(
    const Feedback& feedback, int head, int storage, const float* x, int count, int size, float* target) {
    thread_local Scratch memory;
    const int length = feedback.length;
    Carver carver(memory.reserve(count * (2 * sizeof(IntegerRun) + length * sizeof(float)) + 2 * 64));
    IntegerRun* runs = carver.take<IntegerRun>(2 * count);
    float* missing = carver.take<float>(count * length);
    int runs_each = 1;
    for (int i = 0; i < count; ++i) runs_each = integer_runs(storage, x + i * size, size, runs + 2 * i);
    memcpy(target, x, size_t(count) * size * sizeof(float));
    const Float16* matrix = feedback.matrix + head * feedback.stride;
    for (int start = 0; start + length < size; start += length) {
        for (int i = 0; i < count; ++i) {
            const IntegerRun run = runs[2 * i + (start * runs_each >= size)];
            for (int j = 0; j < length; ++j) {
                const int at = i * size + start + j;
                missing[i * length + j] = x[at] - run.value(run.code(target[at]));
            }
        }
        // The matrix is 0 in blocks that were rounded already.
        const int first = (start + length) / LANES * LANES;
        product(missing, length, matrix + start * size + first, size, target + first, size, count, length,
                size - first, true);
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
