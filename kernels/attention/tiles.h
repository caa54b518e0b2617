// Products of pairs of bfloat16 by the tile registers of AMX: 16 rows of 64 bytes. See pairs.h.
#pragma once

#include "halves.h"

#if defined(__AMX_BF16__)

namespace sparsekv::SPARSEKV_ISA {

struct Tiles {
    // Registers 0 and 1: scores, queries by keys. 2: queries. 3: pairs of elements by keys, or of values
    // by elements. 4 and 5: results, queries by elements. 6 and 7: the two parts of weights.
    static void begin(int rows) {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = 64;
            config.rows[i] = static_cast<uint8_t>(i == 3 ? TILE : rows);
        }
        asm volatile("" : : "r"(&config) : "memory");  // the compiler believes that 8 bytes are read
        _tile_loadconfig(&config);
    }

    static void end() { _tile_release(); }

    // Scores of 16 rows of the query, by elements first to last, and n keys.
    static void score(const uint16_t* query, int size, int, const uint32_t* columns, int n, int first, int last,
                      float* scores) {
        for (int i = 0; i < n; i += 2 * TILE) {
            _tile_zero(0);
            _tile_zero(1);
            for (int d = first; d < last; d += PAIRS_DEPTH) {
                _tile_loadd(2, query + d, size * 2);
                _tile_loadd(3, columns + column_tile(i, d), 64);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(3, columns + column_tile(i + TILE, d), 64);
                _tile_dpbf16ps(1, 2, 3);
            }
            _tile_stored(0, scores + i, PAIR_BATCH * 4);
            _tile_stored(1, scores + i + TILE, PAIR_BATCH * 4);
        }
    }

    // Adds n values, weighted by two parts each, to 16 rows of the result.
    static void add(const uint16_t* weights, const uint16_t* rest, int, const uint32_t* values, int n, int size,
                    float* out) {
        for (int d = 0; d < size; d += 2 * TILE) {
            _tile_loadd(4, out + d, size * 4);
            _tile_loadd(5, out + d + TILE, size * 4);
            for (int i = 0; i < n; i += PAIRS_DEPTH) {
                const uint32_t* pairs = values + i / 2 * size + d;
                _tile_loadd(6, weights + i, PAIR_BATCH * 2);
                _tile_loadd(7, rest + i, PAIR_BATCH * 2);
                _tile_loadd(3, pairs, size * 4);
                _tile_dpbf16ps(4, 6, 3);
                _tile_dpbf16ps(4, 7, 3);
                _tile_loadd(3, pairs + TILE, size * 4);
                _tile_dpbf16ps(5, 6, 3);
                _tile_dpbf16ps(5, 7, 3);
            }
            _tile_stored(4, out + d, size * 4);
            _tile_stored(5, out + d + TILE, size * 4);
        }
    }
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
