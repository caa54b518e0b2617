// Prunes keys and values and packs them into pages; reference.py says what it computes.
//
// The k largest magnitudes are found without a sort: the bits of |x| order as integers, so a
// bisection on them finds the k-th largest, counting the elements at or above each guess.

#include <cmath>

#include "pack.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int MAX_HEAD_SIZE = 1024;

// Mirrors calls.PackCall. Strides count elements, those of the pages bytes.
struct PackCall {
    const uint8_t *key, *value;
    uint8_t* pages;
    const int64_t* slot_mapping;
    int64_t key_stride, value_stride, page_stride, page_head_stride;
    int64_t num_tokens;
    int32_t num_kv_heads, block_size, num_threads;
    Layout layout;
    Feedback key_feedback, value_feedback;
};

template <class Bits>
int count_from(const Bits* magnitude, int size, Bits least) {
    Bits count = 0;  // as wide as the elements, so that the loop vectorises well
    for (int i = 0; i < size; ++i) count += magnitude[i] >= least;
    return count;
}

// Flags the `survivors` largest magnitudes, ties to the lower index.
template <class Bits>
void select(const Bits* magnitude, int size, int survivors, uint8_t* kept) {
    constexpr Bits TOP = static_cast<Bits>(Bits(1) << (8 * sizeof(Bits) - 2));
    Bits threshold = 0;  // the largest value that at least `survivors` magnitudes reach
    int count = size;
    for (Bits bit = TOP; bit && count != survivors; bit >>= 1) {
        const Bits guess = threshold | bit;
        const int reached = count_from(magnitude, size, guess);
        if (reached >= survivors) {
            threshold = guess;
            count = reached;
        }
    }
    for (int i = 0; i < size; ++i) kept[i] = magnitude[i] >= threshold;
    // Too many reach it: drop ties from the end.
    for (int i = size - 1; count > survivors; --i)
        if (magnitude[i] == threshold) {
            kept[i] = 0;
            --count;
        }
}

// `nan` is the least magnitude of a NaN, which stands for all of them.
template <class Bits>
void select_row(const uint8_t* row, int size, int survivors, Bits nan, uint8_t* kept) {
    alignas(64) Bits magnitude[MAX_HEAD_SIZE];
    memcpy(magnitude, row, size * sizeof(Bits));
    for (int i = 0; i < size; ++i) {
        magnitude[i] &= static_cast<Bits>(static_cast<Bits>(~Bits(0)) >> 1);
        magnitude[i] = magnitude[i] < nan ? magnitude[i] : nan;
    }
    select(magnitude, size, survivors, kept);
}

// A row as float32, with one zero and one NaN.
void read_row(const uint8_t* row, const Layout& layout, float* x) {
    decode_row(layout.storage, row, layout.head_size, x);
    for (int i = 0; i < layout.head_size; ++i) x[i] = x[i] == x[i] ? x[i] + 0.f : NAN;
}

void pack_row(
    const uint8_t* row, const Layout& layout, const VectorLayout& vector, const Section<uint8_t>& section, int offset) {
    const int size = layout.head_size;
    alignas(64) float x[MAX_HEAD_SIZE];
    read_row(row, layout, x);
    if (const int bitmap_bytes = layout.bitmap_bytes(vector)) {
        alignas(64) uint8_t kept[MAX_HEAD_SIZE];
        if (layout.storage == FLOAT32) select_row<uint32_t>(row, size, vector.survivors, 0x7f800001, kept);
        else select_row<uint16_t>(row, size, vector.survivors, layout.storage == FLOAT16 ? 0x7c01 : 0x7f81, kept);
        uint8_t* bitmap = section.bitmap + offset * bitmap_bytes;
        for (int i = 0; i < size; i += 8) {
            uint64_t flags;
            memcpy(&flags, kept + i, 8);
            bitmap[i / 8] = static_cast<uint8_t>(flags * 0x0102040810204080u >> 56);
        }
        for (int i = 0, rank = 0; i < size; ++i) {
            x[rank] = x[i];
            rank += kept[i];
        }
    }
    encode(vector.storage, x, vector.survivors, section.values + offset * vector.value_bytes(),
           section.scales + offset * scale_bytes(vector.storage));
}

void pack_rows(
    const Packing& packing, int count, const Layout& layout, const VectorLayout& vector,
    Section<uint8_t> Tile<uint8_t>::*section, const Feedback& feedback, int head) {
    const int size = layout.head_size;
    thread_local Scratch memory;
    const auto row = [&](int i) { return packing.rows + i * packing.stride * layout.element_bytes(); };
    float* target = nullptr;
    IntegerRun runs[2 * PACK_ROWS];
    if (feedback.matrix) {
        float* x = static_cast<float*>(memory.reserve(2 * size_t(PACK_ROWS) * size * sizeof(float)));
        target = x + PACK_ROWS * size;
        for (int i = 0; i < count; ++i) read_row(row(i), layout, x + i * size);
        feed_back(feedback, head, vector.storage, x, count, size, target, runs);
    }
    for (int i = 0; i < count; ++i) {
        const int64_t slot = packing.slots[i];
        if (slot < 0) continue;
        const Tile<uint8_t> tile(
            packing.pages + slot / packing.block_size * packing.page_stride, packing.block_size, layout);
        const int offset = static_cast<int>(slot % packing.block_size);
        const Section<uint8_t>& entries = tile.*section;
        if (!target) pack_row(row(i), layout, vector, entries, offset);
        else encode_runs(vector.storage, runs + 2 * i, target + i * size, size,
                         entries.values + offset * vector.value_bytes(),
                         entries.scales + offset * scale_bytes(vector.storage));
    }
}

SPARSEKV_EXPORT(pack)(const PackCall* call) {
    const Layout& layout = call->layout;
    const int64_t blocks = (call->num_tokens + PACK_ROWS - 1) / PACK_ROWS, pieces = 2 * blocks * call->num_kv_heads;
#pragma omp parallel for num_threads(call->num_threads) schedule(static) if (call->num_tokens * call->num_kv_heads > 64)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int head = static_cast<int>(piece / 2 % call->num_kv_heads);
        const int64_t first = piece / 2 / call->num_kv_heads * PACK_ROWS, left = call->num_tokens - first;
        const int count = static_cast<int>(left < PACK_ROWS ? left : PACK_ROWS);
        const auto pack = [&](const uint8_t* rows, int64_t stride, const VectorLayout& vector,
                              Section<uint8_t> Tile<uint8_t>::*section, const Feedback& feedback) {
            const int64_t element = first * stride + int64_t(head) * layout.head_size;
            pack_rows({rows + element * layout.element_bytes(), stride, call->slot_mapping + first,
                       call->pages + head * call->page_head_stride, call->page_stride, call->block_size},
                      count, layout, vector, section, feedback, head);
        };
        if (piece % 2 == 0) pack(call->key, call->key_stride, layout.key, &Tile<uint8_t>::key, call->key_feedback);
        else pack(call->value, call->value_stride, layout.value, &Tile<uint8_t>::value, call->value_feedback);
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
