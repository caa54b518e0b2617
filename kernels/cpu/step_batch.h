// The requests of a step, the same for all layers that share a block table (Batch in step/reference.py).
#pragma once

#include <cstdint>

#include "simd.h"

namespace sparsekv::SPARSEKV_ISA {

// Mirrors calls.StepBatch. Without a window its table is nullptr, a ring has 1 block then.
struct StepBatch {
    const int32_t *query_start_loc, *seq_lens, *block_table, *window_block_table;
    const int64_t* slot_mapping;
    int64_t block_table_stride, window_block_table_stride, num_slots;
    int32_t num_reqs, blocks_per_ring;

    int query_len(int request) const { return query_start_loc[request + 1] - query_start_loc[request]; }

    const int32_t* pages(int request) const { return block_table + request * block_table_stride; }

    const int32_t* ring(int request) const { return window_block_table + request * window_block_table_stride; }
};

}  // namespace sparsekv::SPARSEKV_ISA
