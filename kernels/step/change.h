// The change of basis of the rows of one KV head (vllm_sparsekv/format/basis.py), in float32. Its matrices
// have 16 bits: a decode step reads every layer's once, from memory.
#pragma once

#include "../attention/matrix.h"
#include "../attention/plan.h"

namespace sparsekv::SPARSEKV_ISA {

inline void multiply(const Change& change, int head, const float* rows, int count, int size, float* out) {
    const Float16* matrix = change.matrix + head * change.matrix_stride;
    if (count <= PRODUCT_ROWS) return product(rows, size, matrix, size, out, size, count, size, size, false);
    thread_local Scratch memory;
    constexpr int WIDTH = PRODUCT_WIDTH * LANES;
    float* part = static_cast<float*>(memory.reserve(size_t(size) * WIDTH * sizeof(float)));
    for (int j = 0; j < size; j += WIDTH) {
        const int columns = size - j < WIDTH ? size - j : WIDTH;
        for (int i = 0; i < size; ++i)
            for (int d = 0; d < columns; d += LANES) store(part + i * WIDTH + d, load(matrix + i * size + j + d));
        product(rows, size, part, WIDTH, out + j, size, count, size, columns, false);
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
