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

// What `count` rows x of one KV head are to be rounded at, and their runs, two a row.
inline void feed_back(const Feedback& feedback, int head, int storage, const float* x, int count, int size,
                      float* target, IntegerRun* runs) {
    thread_local Scratch memory;
    const int length = feedback.length;
    float* missing = static_cast<float*>(memory.reserve(size_t(count) * length * sizeof(float)));
    int runs_each = 1;
    for (int i = 0; i < count; ++i) runs_each = integer_runs(storage, x + i * size, size, runs + 2 * i);
    memcpy(target, x, size_t(count) * size * sizeof(float));
    const Float16* matrix = feedback.matrix + head * feedback.stride;
    for (int start = 0; start + length < size; start += length) {
        for (int i = 0; i < count; ++i) {
            const IntegerRun& run = runs[2 * i + (start * runs_each >= size)];
            const int at = i * size + start;
            for (int j = 0; j < length; j += LANES) {
                const F exact = load_first(x + at + j, length - j), wanted = load_first(target + at + j, length - j);
                store_first(missing + i * length + j, exact - run.value(run.code(wanted)), length - j);
            }
        }
        // The matrix is 0 in blocks that were rounded already.
        const int first = (start + length) / LANES * LANES;
        product(missing, length, matrix + start * size + first, size, target + first, size, count, length,
                size - first, true);
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
