// Copies each request's newest tokens of this step into its ring; reference.py says which.

#include "../cpu/encode.h"
#include "../cpu/scratch.h"
#include "window.h"

namespace sparsekv::SPARSEKV_ISA {

// One vector of the model dtype to a slot; the step is that of int8.
static void write_vector(const Layout& layout, const uint8_t* row, uint8_t* stored, uint8_t* step) {
    if (layout.window_bytes != 1) {
        memcpy(stored, row, layout.row_bytes());
        return;
    }
    thread_local Scratch memory;
    float* x = static_cast<float*>(memory.reserve(layout.head_size * sizeof(float)));
    decode_row(layout.storage, row, layout.head_size, x);
    const uint16_t bits = encode_int8(x, layout.head_size, reinterpret_cast<int8_t*>(stored));
    memcpy(step, &bits, sizeof bits);
}

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
            uint8_t *value = content + layout.slot_row_bytes(), *behind = value + layout.slot_row_bytes();
            write_vector(layout, call.key + (token * call.key_stride + column) * layout.element_bytes(), content,
                         behind + sizeof tag);
            write_vector(layout, call.value + (token * call.value_stride + column) * layout.element_bytes(), value,
                         behind + sizeof tag + sizeof(uint16_t));
            memcpy(behind, &tag, sizeof tag);
        }
    }
}

SPARSEKV_EXPORT(write_window)(const WindowCall* call) {
#pragma omp parallel for num_threads(call->num_threads) schedule(dynamic, 1) if (call->batch.num_reqs > 8)
    for (int request = 0; request < call->batch.num_reqs; ++request) write_request(*call, request);
}

}  // namespace sparsekv::SPARSEKV_ISA
