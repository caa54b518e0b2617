// Where the ring of a request holds the newest tokens of its history.
#pragma once

#include "plan.h"

namespace sparsekv::SPARSEKV_ISA {

// Calls take(position, content, count) for each run of neighbouring slots of those positions of one KV head.
template <class Take>
void each_run(const AttentionCall& call, const Unit& unit, int first, int last, Take take) {
    const int ring = call.slots_per_block * call.batch.blocks_per_ring;
    const int32_t* table = call.batch.ring(unit.index);
    const uint8_t* head = call.window + unit.head * call.window_head_stride;
    for (int position = first; position < last;) {
        const int block = position % ring / call.slots_per_block, slot = position % ring % call.slots_per_block;
        const int there = call.slots_per_block - slot, count = last - position < there ? last - position : there;
        take(position, head + table[block] * call.window_stride + slot * call.layout.slot_bytes(), count);
        position += count;
    }
}

// The first position that the window may hold and a query sees.
inline int first_held(const AttentionCall& call, int context, int first_seen) {
    const int first = context - call.layout.window;
    return first > first_seen ? first : first_seen < context ? first_seen : context;
}

// Of one KV head of one request.
class RingSlots {
  public:
    void carve(Carver& carver, const Layout& layout) { slots_ = carver.take<const uint8_t*>(layout.window); }

    // Finds the slots that hold what a query sees.
    void find(const AttentionCall& call, const Unit& unit, int first_seen) {
        const Layout& layout = call.layout;
        first_ = first_held(call, unit.request->context, first_seen);
        each_run(call, unit, first_, unit.request->context, [&](int position, const uint8_t* content, int count) {
            for (const int end = position + count; position < end; ++position, content += layout.slot_bytes()) {
                int32_t tag;
                memcpy(&tag, content + 2 * layout.slot_row_bytes(), sizeof tag);
                slots_[position - first_] = tag == position + 1 ? content : nullptr;
            }
        });
    }

    // The first position that may be held.
    int first() const { return first_; }

    // The whole copy of a computed position, or nullptr where it must be read pruned.
    const uint8_t* at(int position) const { return position < first_ ? nullptr : slots_[position - first_]; }

  private:
    const uint8_t** slots_ = nullptr;  // of positions from first_ on
    int first_ = 0;
};

}  // namespace sparsekv::SPARSEKV_ISA
