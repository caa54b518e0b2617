// What pack/cpu.cpp offers to kernels that pack on the way.
#pragma once

#include "../cpu/layout.h"
#include "feedback.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int PACK_ROWS = 4 * PRODUCT_ROWS;  // vectors that share the loads of a matrix

// Where the vectors of consecutive tokens of one KV head come from and go to.
struct Packing {
    const uint8_t* rows;
    int64_t stride;  // elements from token to token
    const int64_t* slots;
    uint8_t* pages;  // of the KV head
    int64_t page_stride;
    int block_size;
};

// `count` vectors of the model dtype, PACK_ROWS at most, to their entries of the tiles' section.
void pack_rows(
    const Packing& packing, int count, const Layout& layout, const VectorLayout& vector,
    Section<uint8_t> Tile<uint8_t>::*section, const Feedback& feedback, int head);

}  // namespace sparsekv::SPARSEKV_ISA
