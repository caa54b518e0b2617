// Products of bytes, summed in 32 bits: by the tile registers of AMX, where there are, or in vector registers.
#pragma once

#include "bytes.h"
#include "tile_registers.h"

#if defined(__AVX512VNNI__)

namespace sparsekv::SPARSEKV_ISA {

// Which of two factors has signed bytes; those of the other are not.
enum class Signed { LEFT, RIGHT };

#if defined(__AMX_INT8__)

struct ByteProducts {
    static constexpr int DEPTH = 64;  // what depths are multiples of

    // For products of `rows` rows at most.
    static void begin(int rows) { configure_tiles(5, rows); }
    static void end() { _tile_release(); }

    // out (rows x BYTE_COLUMNS) = left (rows x depth) . right (depth / 4 x BYTE_COLUMNS); memory holds a
    // multiple of TILE rows.
    template <Signed SIGNED>
    static void multiply(const int8_t* left, int stride, int rows, const uint32_t* right, int depth, int32_t* out) {
        // Registers 0 to 3: out. 4: left. 5 to 7: right.
#define SPARSEKV_MULTIPLY(i, b)                                                              \
    _tile_loadd(b, right + k / 4 * BYTE_COLUMNS + i * 16, BYTE_COLUMNS * sizeof(uint32_t));  \
    if constexpr (SIGNED == Signed::LEFT) _tile_dpbsud(i, 4, b);                             \
    else _tile_dpbusd(i, 4, b);
        for (int row = 0; row < rows; row += TILE, left += TILE * stride, out += TILE * BYTE_COLUMNS) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < depth; k += 64) {
                _tile_loadd(4, left + k, stride);
                SPARSEKV_MULTIPLY(0, 5)
                SPARSEKV_MULTIPLY(1, 6)
                SPARSEKV_MULTIPLY(2, 7)
                SPARSEKV_MULTIPLY(3, 5)
            }
            _tile_stored(0, out, BYTE_COLUMNS * sizeof(int32_t));
            _tile_stored(1, out + 16, BYTE_COLUMNS * sizeof(int32_t));
            _tile_stored(2, out + 32, BYTE_COLUMNS * sizeof(int32_t));
            _tile_stored(3, out + 48, BYTE_COLUMNS * sizeof(int32_t));
        }
#undef SPARSEKV_MULTIPLY
    }
};

#else

class ByteProducts {
  public:
    static constexpr int DEPTH = 4;

    static void begin(int) {}
    static void end() {}

    // As above.
    template <Signed SIGNED>
    static void multiply(const int8_t* left, int stride, int rows, const uint32_t* right, int depth, int32_t* out) {
        for (; rows >= 6; rows -= 6, left += 6 * stride, out += 6 * BYTE_COLUMNS)
            multiply_rows<SIGNED, 6>(left, stride, right, depth, out);
        if (rows >= 3) {
            multiply_rows<SIGNED, 3>(left, stride, right, depth, out);
            rows -= 3, left += 3 * stride, out += 3 * BYTE_COLUMNS;
        }
        for (; rows; --rows, left += stride, out += BYTE_COLUMNS)
            multiply_rows<SIGNED, 1>(left, stride, right, depth, out);
    }

  private:
    // sums += unsigned x * signed y, in registers: the compiler would copy sums around.
    static void add_products(__m512i& sums, __m512i x, __m512i y) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(y));
    }

    template <Signed SIGNED, int ROWS>
    static void multiply_rows(const int8_t* left, int stride, const uint32_t* right, int depth, int32_t* out) {
        __m512i sums[ROWS][4] = {};
        for (int k = 0; k < depth; k += 4, right += BYTE_COLUMNS) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) x[i] = _mm512_load_si512(right + 16 * i);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; ++row) {
                int32_t four;
                memcpy(&four, left + row * stride + k, sizeof four);
                const __m512i y = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    if constexpr (SIGNED == Signed::LEFT) add_products(sums[row][i], x[i], y);
                    else add_products(sums[row][i], y, x[i]);
                }
            }
        }
        for (int row = 0; row < ROWS; ++row)
            for (int i = 0; i < 4; ++i) _mm512_store_si512(out + row * BYTE_COLUMNS + 16 * i, sums[row][i]);
    }
};

#endif

}  // namespace sparsekv::SPARSEKV_ISA

#endif
