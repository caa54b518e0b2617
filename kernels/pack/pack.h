// What pack/cpu.cpp offers to kernels that pack on the way.
#pragma once

#include "../cpu/layout.h"

namespace sparsekv::SPARSEKV_ISA {

// One row of the model dtype to its entries of a tile's section.
void pack_row(
    const uint8_t* row, const Layout& layout, const VectorLayout& vector, const Section<uint8_t>& section, int offset);

}  // namespace sparsekv::SPARSEKV_ISA
