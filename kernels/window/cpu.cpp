// Copies each request's newest tokens of this step into its ring; reference.py says which.

#include "window.h"

namespace sparsekv::SPARSEKV_ISA {

void write_request(const WindowCall& call, int request) {
    const Layout& layout = call.layout;
    const StepBatch& batch = call.batch;
    const int ring = call.slots_per_block * batch.blocks_per_ring;
    const int end = batch.query_start_loc[request + 1], seq_len = batch.seq_lens[request];
    int first = batch.query_start_loc[request];
    if (end - first > ring) first = end - ring;
    for (int64_t token = first; token < end && token < batch.num_slots; ++token) {
        if (batch.slot_mapping[token] < 0) continue;
        const int position = static_cast<int>(seq_len - end + token), slot = position % ring;
        const int32_t block = batch.ring(request)[slot / call.slots_per_block];
        if (block <= 0) continue;
        uint8_t* content = call.window + block * call.window_stride + slot % call.slots_per_block * layout.slot_bytes();
        for (int head = 0; head < call.num_kv_heads; ++head, content += call.window_head_stride) {
            const int64_t column = int64_t(head) * layout.head_size;
            const int32_t tag = position + 1;
            memcpy(content, call.key + (token * call.key_stride + column) * layout.element_bytes(), layout.row_bytes());
            memcpy(content + layout.row_bytes(),
                   call.value + (token * call.value_stride + column) * layout.element_bytes(), layout.row_bytes());
            memcpy(content + 2 * layout.row_bytes(), &tag, sizeof tag);
        }
    }
}

SPARSEKV_EXPORT(write_window)(const WindowCall* call) {
#pragma omp parallel for num_threads(call->num_threads) schedule(dynamic, 1) if (call->batch.num_reqs > 8)
    for (int request = 0; request < call->batch.num_reqs; ++request) write_request(*call, request);
}

}  // namespace sparsekv::SPARSEKV_ISA
