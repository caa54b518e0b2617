// The shapes of AMX's tile registers.
#pragma once

#include "turn.h"

#if defined(__AMX_TILE__)

namespace sparsekv::SPARSEKV_ISA {

// The first `count` registers have `rows` rows, TILE at most, and the others TILE; of 64 bytes all.
inline void configure_tiles(int count, int rows) {
    alignas(64) struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    } config;
    for (int tile = 0; tile < count && rows < TILE; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
    asm volatile("" : : "r"(&config) : "memory");  // the compiler believes that 8 bytes are read
    _tile_loadconfig(&config);
}

}  // namespace sparsekv::SPARSEKV_ISA

#endif
