// The change of basis of the rows of one KV head (vllm_sparsekv/format/basis.py), in float32.
#pragma once

#include "../attention/matrix.h"
#include "../attention/plan.h"

namespace sparsekv::SPARSEKV_ISA {

inline void multiply(const Change& change, int head, const float* rows, int count, int size, float* out) {
    product(rows, size, change.matrix + head * change.matrix_stride, size, out, size, count, size, size, false);
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
