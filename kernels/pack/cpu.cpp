// Prunes keys and values and packs them into pages; reference.py says what it computes.
//
// The k largest magnitudes are found without a sort: the bits of |x| order as integers, so a
// bisection on them finds the k-th largest, counting the elements at or above each guess.

#include <cmath>

#include "../cpu/encode.h"
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

void pack_row(
    const uint8_t* row, const Layout& layout, const VectorLayout& vector, const Section<uint8_t>& section, int offset) {
    const int size = layout.head_size;
    alignas(64) float x[MAX_HEAD_SIZE];
    decode_row(layout.storage, row, size, x);
    for (int i = 0; i < size; ++i) x[i] = x[i] == x[i] ? x[i] + 0.f : NAN;  // -0 to 0, and one NaN
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

SPARSEKV_EXPORT(pack)(const PackCall* call) {
    const Layout& layout = call->layout;
    const int64_t rows = call->num_tokens * call->num_kv_heads;
#pragma omp parallel for num_threads(call->num_threads) schedule(static) if (rows > 64)
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t token = i / call->num_kv_heads, head = i % call->num_kv_heads;
        const int64_t slot = call->slot_mapping[token], column = head * layout.head_size;
        if (slot < 0) continue;
        const Tile<uint8_t> tile(
            call->pages + slot / call->block_size * call->page_stride + head * call->page_head_stride,
            call->block_size, layout);
        const int offset = static_cast<int>(slot % call->block_size);
        pack_row(call->key + (token * call->key_stride + column) * layout.element_bytes(), layout, layout.key,
                 tile.key, offset);
        pack_row(call->value + (token * call->value_stride + column) * layout.element_bytes(), layout,
                 layout.value, tile.value, offset);
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
