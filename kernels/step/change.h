// The change of basis of the rows of one KV head (vllm_sparsekv/format/basis.py), in float32. Its matrices
// have 16 bits: a decode step reads every layer's once, from memory.
#pragma once

#include "../attention/matrix.h"
#include "../attention/plan.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int PANEL = 32;  // columns that lie together, row after row, as step.py orders them

inline void multiply(const Change& change, int head, const float* rows, int count, int size, float* out) {
    const Float16* panel = change.matrix + head * change.matrix_stride;
    if (count <= PRODUCT_ROWS) {
        for (int j = 0; j < size; j += PANEL, panel += size * PANEL) {
            const int columns = size - j < PANEL ? size - j : PANEL;
            product(rows, size, panel, columns, out + j, size, count, size, columns, false);
        }
        return;
    }
    // Many rows read float32, in panels as wide as a block of the product.
    constexpr int WIDE = PRODUCT_WIDTH * LANES > PANEL ? PRODUCT_WIDTH * LANES : PANEL;
    thread_local Scratch memory;
    float* wide = static_cast<float*>(memory.reserve(size_t(size) * WIDE * sizeof(float)));
    for (int j = 0; j < size; j += WIDE) {
        const int all = size - j < WIDE ? size - j : WIDE;
        for (int first = 0; first < all; first += PANEL) {
            const int columns = all - first < PANEL ? all - first : PANEL;
            for (int i = 0; i < size; ++i, panel += columns)
                for (int k = 0; k < columns; k += LANES) store(wide + i * all + first + k, load(panel + k));
        }
        product(rows, size, wide, all, out + j, size, count, size, all, false);
    }
}

// out = (rows - mean) matrix; the rows are overwritten.
inline void change_rows(const Change& change, int head, float* rows, int count, int size, float* out) {
    if (change.mean)
        for (int i = 0; i < count; ++i)
            for (int d = 0; d < size; d += LANES)
                store(rows + i * size + d, load(rows + i * size + d) - load(change.mean + head * size + d));
    multiply(change, head, rows, count, size, out);
}

// out = rows matrix + mean.
inline void change_back(const Change& change, int head, const float* rows, int count, int size, float* out) {
    multiply(change, head, rows, count, size, out);
    if (change.mean)
        for (int i = 0; i < count; ++i)
            for (int d = 0; d < size; d += LANES)
                store(out + i * size + d, load(out + i * size + d) + load(change.mean + head * size + d));
}

}  // namespace sparsekv::SPARSEKV_ISA
