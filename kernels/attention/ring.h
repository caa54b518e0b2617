// Where the ring of a request holds the newest tokens of its history.
#pragma once

#include "plan.h"

namespace sparsekv::SPARSEKV_ISA {

class RingSlots {
  public:
    void carve(Carver& carver, const Layout& layout) { slots_ = carver.take<const uint8_t*>(layout.window); }

    // Those of one KV head that hold positions from `first_seen` on, if their tags say so.
    void find(const AttentionCall& call, const Unit& unit, int first_seen) {
        end_ = unit.request->context;
        first_ = end_ > call.layout.window ? end_ - call.layout.window : 0;
        if (first_ < first_seen) first_ = first_seen;
        if (first_ >= end_) return;
        const int32_t* table = call.batch.ring(unit.index);
        const uint8_t* head = call.window + unit.head * call.window_head_stride;
        const int in_ring = first_ % (call.slots_per_block * call.batch.blocks_per_ring);
        int block = in_ring / call.slots_per_block, slot = in_ring % call.slots_per_block;
        for (int position = first_; position < end_; ++position) {
            slots_[position - first_] = head + table[block] * call.window_stride + slot * call.layout.slot_bytes();
            if (++slot < call.slots_per_block) continue;
            slot = 0;
            if (++block == call.batch.blocks_per_ring) block = 0;
        }
    }

    void expect(const Layout& layout) const {
        for (int position = first_; position < end_; ++position)
            prefetch(slots_[position - first_], layout.slot_bytes());
    }

    int first() const { return first_; }

    // The dense copy of a computed position, or nullptr where it must be read pruned.
    const uint8_t* at(int position, const Layout& layout) const {
        if (position < first_) return nullptr;
        const uint8_t* content = slots_[position - first_];
        int32_t tag;
        memcpy(&tag, content + 2 * layout.row_bytes(), sizeof tag);
        return tag == position + 1 ? content : nullptr;
    }

  private:
    const uint8_t** slots_ = nullptr;  // of positions from first_ on
    int first_ = 0, end_ = 0;
};

}  // namespace sparsekv::SPARSEKV_ISA
