// Where everything lies in a page and in a window slot (vllm_sparsekv/format/layout.py).
#pragma once

#include "codec.h"

// The binary's entry points are named sparsekv_<kernel>_<instruction set>.
#define SPARSEKV_JOIN(name, isa) sparsekv_##name##_##isa
#define SPARSEKV_ENTRY(name, isa) SPARSEKV_JOIN(name, isa)
#define SPARSEKV_KERNEL(name) SPARSEKV_ENTRY(name, SPARSEKV_ISA)
#define SPARSEKV_EXPORT(name) extern "C" __attribute__((visibility("default"))) void SPARSEKV_KERNEL(name)

namespace sparsekv::SPARSEKV_ISA {

// Mirrors calls.VectorLayout.
struct VectorLayout {
    int32_t survivors;
    int32_t storage;

    int value_bytes() const { return survivors * storage_bits(storage) / 8; }
};

// Mirrors calls.Layout.
struct Layout {
    int32_t head_size;
    int32_t storage;  // of the model
    int32_t window;
    int32_t window_bytes;  // of an element there: those of the model, or 1 of int8
    VectorLayout key, value;

    // 0 where every element survives.
    int bitmap_bytes(const VectorLayout& x) const { return x.survivors < head_size ? head_size / 8 : 0; }
    int element_bytes() const { return storage_bits(storage) / 8; }
    int row_bytes() const { return head_size * element_bytes(); }
    // In the window.
    int slot_row_bytes() const { return head_size * window_bytes; }
    int slot_bytes() const { return 2 * slot_row_bytes() + 8; }
    int token_bytes() const {
        return bitmap_bytes(key) + bitmap_bytes(value) + key.value_bytes() + value.value_bytes() +
               scale_bytes(key.storage) + scale_bytes(value.storage);
    }
};

template <class Byte>
struct Section {
    Byte *bitmap, *values, *scales;
};

// The sections of one tile: N tokens of one KV head.
template <class Byte>
struct Tile {
    Section<Byte> key, value;
    Tile(Byte* tile, int64_t tokens, const Layout& layout) {
        key.bitmap = tile;
        value.bitmap = key.bitmap + tokens * layout.bitmap_bytes(layout.key);
        key.values = value.bitmap + tokens * layout.bitmap_bytes(layout.value);
        value.values = key.values + tokens * layout.key.value_bytes();
        key.scales = value.values + tokens * layout.value.value_bytes();
        value.scales = key.scales + tokens * scale_bytes(layout.key.storage);
    }
};

}  // namespace sparsekv::SPARSEKV_ISA
