// Products of pairs of bfloat16 by the tile registers of AMX: 16 rows of 64 bytes. See pairs.h.
#pragma once

#include "halves.h"
#include "tile_registers.h"

#if defined(__AMX_BF16__)

namespace sparsekv::SPARSEKV_ISA {

struct Tiles {
    static constexpr int PARTS = 1;

    static void begin() { configure_tiles(0, TILE); }
    static void end() { _tile_release(); }

    // out (rows x TILE) [+]= left (rows x depth) . the sum of right, each (depth / 2 x TILE) of
    // pairs; rows and depth are multiples of 32.
    static void multiply(const uint16_t* left, int stride, int rows, uint32_t* const (&right)[PARTS], int depth,
                         float* out, bool accumulate) {
        int row = 0;
        for (; row + 4 * TILE <= rows; row += 4 * TILE)
            multiply_tiles<4>(left + row * stride, stride, right[0], depth, out + row * TILE, accumulate);
        if (row < rows) multiply_tiles<2>(left + row * stride, stride, right[0], depth, out + row * TILE, accumulate);
    }

  private:
    // Registers 0 to 3: out. 4 and 5: left, in turn. 6: right.
    template <int COUNT>
    static void multiply_tiles(const uint16_t* left, int stride, const uint32_t* right, int depth, float* out,
                               bool accumulate) {
#define SPARSEKV_TILES(DO) DO(0, 4) DO(1, 5) if constexpr (COUNT == 4) { DO(2, 4) DO(3, 5) }
#define SPARSEKV_ZERO(i, a) _tile_zero(i);
#define SPARSEKV_LOAD(i, a) _tile_loadd(i, out + i * TILE * TILE, 64);
#define SPARSEKV_STORE(i, a) _tile_stored(i, out + i * TILE * TILE, 64);
#define SPARSEKV_MULTIPLY(i, a)                               \
    _tile_loadd(a, left + i * TILE * stride + d, stride * 2); \
    _tile_dpbf16ps(i, a, 6);
        if (accumulate) {
            SPARSEKV_TILES(SPARSEKV_LOAD)
        } else {
            SPARSEKV_TILES(SPARSEKV_ZERO)
        }
        for (int d = 0; d < depth; d += PAIRS_DEPTH) {
            _tile_loadd(6, right + d / 2 * TILE, 64);
            SPARSEKV_TILES(SPARSEKV_MULTIPLY)
        }
        SPARSEKV_TILES(SPARSEKV_STORE)
#undef SPARSEKV_MULTIPLY
#undef SPARSEKV_STORE
#undef SPARSEKV_LOAD
#undef SPARSEKV_ZERO
#undef SPARSEKV_TILES
    }
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
