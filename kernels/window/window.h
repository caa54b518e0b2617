// What window/cpu.cpp offers to kernels that fill the ring on the way.
#pragma once

#include "../cpu/layout.h"
#include "../cpu/step_batch.h"

namespace sparsekv::SPARSEKV_ISA {

// Mirrors calls.WindowCall. Strides count elements, those of the window bytes.
struct WindowCall {
    const uint8_t *key, *value;
    uint8_t* window;
    int64_t key_stride, value_stride, window_stride, window_head_stride;
    int32_t num_kv_heads, slots_per_block, num_threads;
    Layout layout;
    StepBatch batch;
};

// One request's newest tokens.
void write_request(const WindowCall& call, int request);

}  // namespace sparsekv::SPARSEKV_ISA
