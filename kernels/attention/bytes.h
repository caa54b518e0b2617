// Whole integer keys and values, and those of a window of int8, as right factors of products that sum four
// bytes at a time (byte_products.h).
#pragma once

#include "../cpu/layout.h"
#include "../cpu/scratch.h"
#include "turn.h"

#if defined(__AVX512VNNI__)

namespace sparsekv::SPARSEKV_ISA {

constexpr int BYTE_COLUMNS = 64;  // bytes of a register, and columns of a right factor
constexpr int BYTE_BATCH = 128;   // keys attended together

// The element in place i of 8, and how bytes get there.
struct ByteOrder {
    alignas(16) uint8_t places[16];
    constexpr ByteOrder(int step, int half) : places{} {
        for (int i = 0; i < 16; ++i) places[i] = static_cast<uint8_t>(i / 8 * 8 + i % 4 * step + i / 4 % 2 * half);
    }
};
inline constexpr ByteOrder NATURAL_ORDER{1, 4};
inline constexpr ByteOrder KEY_ORDER{2, 1};  // even ones first, as int4 codes lie in a word

// Where each of 64 codes comes from: the bytes that hold it and 7 others, and its first bit in those.
template <int BITS>
struct ByteSpread {
    alignas(64) uint8_t bytes[64], bits[64];
    explicit constexpr ByteSpread(const ByteOrder& order) : bytes{}, bits{} {
        for (int i = 0; i < 64; ++i) {
            bytes[i] = static_cast<uint8_t>((i / 8 * BITS + i % 8) % 32);
            bits[i] = static_cast<uint8_t>(order.places[i % 8] * BITS);
        }
    }
};
template <int BITS>
inline constexpr ByteSpread<BITS> NATURAL_SPREAD{NATURAL_ORDER};
template <int BITS>
inline constexpr ByteSpread<BITS> KEY_SPREAD{KEY_ORDER};

// 64 codes of BITS, or as many bytes, of one vector, a byte each. Reads 32 bytes of codes, or those of the
// first `count` codes alone.
template <int BITS>
class Bytes64 {
  public:
    explicit Bytes64(const ByteSpread<BITS>& spread)
        : bytes_(_mm512_load_si512(spread.bytes)), bits_(_mm512_load_si512(spread.bits)) {}

    __m512i operator()(const int8_t* codes) const { return spread(_mm256_loadu_si256((const __m256i*)codes)); }
    __m512i operator()(const uint8_t* codes, int count) const {
        const uint64_t bytes = (uint64_t(1) << (count < 64 ? count : 64) * BITS / 8) - 1;
        return spread(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(bytes), codes));
    }

  private:
    __m512i spread(__m256i codes) const {
        const __m512i bytes = _mm512_permutexvar_epi8(bytes_, _mm512_castsi256_si512(codes));
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(bits_, bytes), _mm512_set1_epi8((1 << BITS) - 1));
    }

    const __m512i bytes_, bits_;
};
template <>
class Bytes64<8> {
  public:
    explicit Bytes64(const ByteSpread<8>&) {}
    __m512i operator()(const int8_t* bytes) const { return _mm512_loadu_si512(bytes); }
};

// The keys, or the values, of a batch: an element is unit * (code - zero), of its band. They stay as they are in
// pages until a row of int8 joins them, or if they have two bands: then all have a byte an element.
class ByteVectors {
  public:
    void carve(Carver& carver, int head_size, const VectorLayout& layout, const ByteOrder& order) {
        layout_ = layout;
        places_ = order.places;
        row_stride_ = round_up(head_size, BYTE_COLUMNS);
        bands = layout.storage == INT4_INT2 ? 2 : 1;
        codes_ = carver.take<int8_t>(BYTE_BATCH * row_stride_ + BYTE_COLUMNS);
        for (int band = 0; band < bands; ++band) {
            units[band] = carver.take<float>(BYTE_BATCH);
            zeros[band] = carver.take<float>(BYTE_BATCH);
        }
    }

    // Appends `count` vectors of a tile, from entry `first` on, as number n and following.
    void add_run(const Section<const uint8_t>& section, int first, int count, int n) {
        const int bytes = layout_.value_bytes();
        const uint8_t* source = section.values + int64_t(first) * bytes;
        const uint8_t* scales = section.scales + first * scale_bytes(layout_.storage);
        if (bands == 2) return add_bands(source, scales, count, n);
        decode_scales(layout_.storage, scales, count, 1.f, units[0] + n, zeros[0] + n);
        memcpy(codes_ + n * bytes, source, count * bytes);
    }

    void begin() { has_rows_ = false; }
    bool has_rows() const { return has_rows_; }

    // Appends a row of int8 as number n, and what it counts in.
    void add_row(const int8_t* row, float unit, int n) {
        if (!has_rows_) spread(n);
        has_rows_ = true;
        int8_t* out = codes_ + n * row_stride_;
        const __m128i places = _mm_load_si128((const __m128i*)places_);
        for (int d = 0; d < layout_.survivors; d += 16)
            _mm_storeu_si128((__m128i*)(out + d), _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(row + d)), places));
        for (int band = 0; band < bands; ++band) {
            units[band][n] = unit;
            zeros[band][n] = 0;
        }
    }

    // As keys, 64 from number `first` on: the columns of (row_stride / 4 x BYTE_COLUMNS) of four elements
    // each, and bytes that count `middle` too much.
    void turn(int first, uint32_t* out) const {
        if (has_rows_ || bands == 2) return turn_rows<8>(codes_ + first * row_stride_, row_stride_, has_rows_, out);
        const int8_t* codes = codes_ + first * layout_.value_bytes();
        switch (layout_.storage) {
            case INT2: return turn_rows<2>(codes, layout_.value_bytes(), false, out);
            case INT3: return turn_rows<3>(codes, layout_.value_bytes(), false, out);
            default: return turn_nibbles(codes, layout_.value_bytes(), out);
        }
    }

    // As values, n of them, a multiple of 64: their elements from d on, (n / 4 x BYTE_COLUMNS) of four rows
    // each. Of 64 values row 4 i + j has those from 16 j + 4 i on; column 16 i + 4 j + k has element
    // 16 j + 4 i + k.
    void pack(int d, int n, uint32_t* out) const {
        if (has_rows_) return pack_rows<8>(codes_ + d, row_stride_, n, out);
        const int8_t* codes = codes_ + d * storage_bits(layout_.storage) / 8;
        switch (layout_.storage) {
            case INT2: return pack_rows<2>(codes, layout_.value_bytes(), n, out);
            case INT3: return pack_rows<3>(codes, layout_.value_bytes(), n, out);
            default: return pack_rows<4>(codes, layout_.value_bytes(), n, out);
        }
    }

    int row_stride() const { return row_stride_; }

    int bands = 1;
    float *units[2] = {nullptr, nullptr}, *zeros[2] = {nullptr, nullptr};

  private:
    // The first n vectors, as in pages, to a byte an element, which counts about as much as one of int8: the digits
    // of a row's weights have one unit. From the last one on, as bytes take more room.
    void spread(int n) {
        if (bands == 2) return;
        switch (layout_.storage) {
            case INT2: return spread<2>(n);
            case INT3: return spread<3>(n);
            default: return spread<4>(n);
        }
    }

    template <int BITS>
    void spread(int n) {
        const Bytes64<BITS> bytes(places_ == KEY_ORDER.places ? KEY_SPREAD<BITS> : NATURAL_SPREAD<BITS>);
        const int chunks = row_stride_ / BYTE_COLUMNS;
        for (int i = n * chunks; i-- > 0;) {
            const int vector = i / chunks, d = i % chunks * BYTE_COLUMNS;
            const int8_t* source = codes_ + vector * layout_.value_bytes() + d * BITS / 8;
            _mm512_storeu_si512(codes_ + vector * row_stride_ + d, _mm512_slli_epi16(bytes(source), 7 - BITS));
        }
        for (int i = 0; i < n; ++i) {
            units[0][i] /= 1 << (7 - BITS);
            zeros[0][i] *= 1 << (7 - BITS);
        }
    }

    void add_bands(const uint8_t* source, const uint8_t* scales, int count, int n) {
        const Bytes64<4> high(KEY_SPREAD<4>);
        const Bytes64<2> low(KEY_SPREAD<2>);
        const int half = layout_.survivors / 2;
        for (int i = n; i < n + count; ++i, source += layout_.value_bytes(), scales += 4) {
            for (int band = 0; band < 2; ++band) {
                const IntScale scale = IntScale::read(scales + 2 * band);
                units[band][i] = scale.step;
                zeros[band][i] = scale.zero / (band ? 32.f : 8.f);
            }
            int8_t* out = codes_ + i * row_stride_;
            if (half == 32) {  // one store, as the load that follows has to wait for two
                const __m512i both = _mm512_inserti64x4(high(source, half), _mm512_castsi512_si256(low(source + 16, half)), 1);
                _mm512_storeu_si512(out, both);
                continue;
            }
            for (int d = 0; d < half; d += 64) _mm512_storeu_si512(out + d, high(source + d / 2, half - d));
            for (int d = 0; d < half; d += 64)
                _mm512_storeu_si512(out + half + d, low(source + half / 2 + d / 4, half - d));
        }
    }

    template <int BITS>
    void turn_rows(const int8_t* codes, int stride, bool is_signed, uint32_t* out) const {
        const Bytes64<BITS> bytes(KEY_SPREAD<BITS>);
        const __m512i middle = _mm512_set1_epi8(is_signed ? -128 : 0);
        for (int i = 0; i < BYTE_COLUMNS; i += 16)
            for (int d = 0; d < row_stride_; d += 64) {
                __m512i a[16];
#pragma GCC unroll 16
                for (int j = 0; j < 16; ++j) a[j] = bytes(codes + (i + j) * stride + d * BITS / 8);
                turn16(a);
#pragma GCC unroll 16
                for (int j = 0; j < 16; ++j)
                    _mm512_store_si512(out + (d / 4 + j) * BYTE_COLUMNS + i, _mm512_xor_si512(a[j], middle));
            }
    }

    // Of int4: 16 vectors of 8 words of 8 codes are turned before they are spread.
    void turn_nibbles(const int8_t* codes, int stride, uint32_t* out) const {
        const __m512i low = _mm512_set1_epi8(15);
        for (int i = 0; i < BYTE_COLUMNS; i += 16, codes += 16 * stride)
            for (int d = 0; d < row_stride_; d += 64) {
                __m512i a[2][4];
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) {
                        const int8_t* first = codes + (8 * half + j) * stride + d / 2;
                        a[half][j] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first)),
                                                        _mm256_loadu_si256((const __m256i*)(first + 4 * stride)), 1);
                    }
                    turn4(a[half]);
                }
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m512i words[2] = {_mm512_shuffle_i32x4(a[0][j], a[1][j], 0x88),
                                              _mm512_shuffle_i32x4(a[0][j], a[1][j], 0xdd)};
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        uint32_t* row = out + (d / 4 + 2 * (4 * half + j)) * BYTE_COLUMNS + i;
                        _mm512_store_si512(row, _mm512_and_si512(words[half], low));
                        _mm512_store_si512(row + BYTE_COLUMNS, _mm512_and_si512(_mm512_srli_epi32(words[half], 4), low));
                    }
                }
            }
    }

    template <int BITS>
    static void pack_rows(const int8_t* codes, int stride, int n, uint32_t* out) {
        const Bytes64<BITS> bytes(NATURAL_SPREAD<BITS>);
        for (int i = 0; i < n; i += 4, codes += 4 * stride) {
            __m512i a[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) a[j] = bytes(codes + j * stride);
            const __m512i low = _mm512_unpacklo_epi8(a[0], a[1]), high = _mm512_unpackhi_epi8(a[0], a[1]);
            const __m512i low2 = _mm512_unpacklo_epi8(a[2], a[3]), high2 = _mm512_unpackhi_epi8(a[2], a[3]);
            uint32_t* row = out + (i / 64 * 16 + i / 4 % 4 * 4 + i / 16 % 4) * BYTE_COLUMNS;
            _mm512_store_si512(row, _mm512_unpacklo_epi16(low, low2));
            _mm512_store_si512(row + 16, _mm512_unpackhi_epi16(low, low2));
            _mm512_store_si512(row + 32, _mm512_unpacklo_epi16(high, high2));
            _mm512_store_si512(row + 48, _mm512_unpackhi_epi16(high, high2));
        }
    }

    VectorLayout layout_{};
    const uint8_t* places_ = nullptr;  // of elements in rows of bytes
    int row_stride_ = 0;
    bool has_rows_ = false;
    int8_t* codes_ = nullptr;  // as in a page, or rows of bytes
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
