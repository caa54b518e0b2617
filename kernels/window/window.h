// What window/cpu.cpp offers to kernels that fill the ring on the way.
#pragma once

#include "../cpu/layout.h"

namespace sparsekv::SPARSEKV_ISA {

// Mirrors calls.WindowCall. Strides count elements, those of the window bytes.
struct WindowCall {
    const uint8_t *key, *value;
    uint8_t* window;
    const int32_t *query_start_loc, *seq_lens, *window_block_table;
    const int64_t* slot_mapping;
    int64_t key_stride, value_stride, window_stride, window_head_stride, window_block_table_stride;
    int64_t num_slots;
    int32_t num_reqs, num_kv_heads, slots_per_block, blocks_per_ring, num_threads;
    Layout layout;
};

// One request's newest tokens.
void write_request(const WindowCall& call, int request);

}  // namespace sparsekv::SPARSEKV_ISA
