// Vectors of pages to rows of bfloat16, for bfloat16 models on processors that multiply those. Whole
// vectors of one band lose nothing: a code less its zero has 8 significant bits at most.
#pragma once

#include "../cpu/fp8.h"
#include "../cpu/layout.h"
#include "turn.h"

#if defined(__AVX512BF16__)

namespace sparsekv::SPARSEKV_ISA {

constexpr int HALVES = 32;  // of one register

constexpr int PAIRS_DEPTH = 32;  // elements of as many pairs
constexpr int PAIR_BATCH = 256;  // keys attended together

// For each zero of a scale (codec.h) and each of the codes 0 .. 2^BITS - 1, repeated, the distance of
// the two in bfloat16.
template <int BITS>
struct Distances {
    alignas(32) uint16_t entries[128][16];
    constexpr Distances() : entries{} {
        for (int zero = 0; zero < 128; ++zero)
            for (int i = 0; i < 16; ++i) {
                const int eighths = ((i & ((1 << BITS) - 1)) << (7 - BITS)) - zero;
                int magnitude = eighths < 0 ? -eighths : eighths, exponent = 127 - (7 - BITS) + 7;
                for (; magnitude && magnitude < 128; magnitude <<= 1) --exponent;
                const int bits = magnitude ? exponent << 7 | (magnitude & 127) : 0;
                entries[zero][i] = static_cast<uint16_t>(bits | (eighths < 0) << 15);
            }
    }
    // 32 entries, the same twice.
    __m512i of(const uint8_t* scale) const {
        return _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)entries[*scale & 127]));
    }
};
template <int BITS>
inline constexpr Distances<BITS> DISTANCES{};

// Where the two bytes come from that hold each code, and the first bit of the code in them.
template <int BITS>
struct Spread {
    alignas(64) uint8_t bytes[64];
    alignas(64) uint16_t bits[32];
    constexpr Spread() : bytes{}, bits{} {
        for (int i = 0; i < 32; ++i) {
            const int byte = i * BITS / 8;
            bytes[2 * i] = static_cast<uint8_t>(byte);
            bytes[2 * i + 1] = static_cast<uint8_t>(byte < 15 ? byte + 1 : 15);
            bits[i] = static_cast<uint16_t>(i * BITS % 8);
        }
    }
};
template <int BITS>
inline constexpr Spread<BITS> SPREAD{};

// What codes of a vector with that scale stand for, in steps.
template <int BITS>
struct HalvesOf {
    const __m512i bytes = _mm512_load_si512(SPREAD<BITS>.bytes), bits = _mm512_load_si512(SPREAD<BITS>.bits), table;

    explicit HalvesOf(const uint8_t* scale) : table(DISTANCES<BITS>.of(scale)) {}

    // 32 codes. Reads 16 bytes.
    __m512i next(const uint8_t* codes) const {
        const __m512i packed = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)codes));
        // The bits above a code look up the same entry, as the table repeats.
        const __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(bytes, packed), bits);
        return _mm512_permutexvar_epi16(index, table);
    }
};

// `count` codes, rounded up to a multiple of 32, of a vector with that scale. May read 16 bytes more.
template <int BITS>
inline void spread_halves(const uint8_t* codes, const uint8_t* scale, int count, uint16_t* out) {
    const HalvesOf<BITS> halves(scale);
    for (int i = 0; i < count; i += HALVES, codes += HALVES * BITS / 8)
        _mm512_storeu_si512(out + i, halves.next(codes));
}

// Survivors to their places, 0 elsewhere. May read 62 bytes more.
inline void place_halves(const uint16_t* survivors, const uint8_t* bitmap, int head_size, uint16_t* out) {
    for (int d = 0; d < head_size; d += HALVES) {
        uint32_t kept;
        memcpy(&kept, bitmap + d / 8, sizeof kept);
        _mm512_storeu_si512(out + d, _mm512_maskz_expand_epi16(kept, _mm512_loadu_si512(survivors)));
        survivors += __builtin_popcount(kept);
    }
}

// The keys, or the values, of a batch.
class Halves {
  public:
    // `capacity` vectors at most.
    void carve(Carver& carver, int capacity, int head_size, const VectorLayout& layout) {
        head_size_ = head_size;
        layout_ = layout;
        whole_ = layout.survivors == head_size;
        bands = layout.storage == INT4_INT2 ? 2 : 1;
        rows = carver.take<uint16_t>(capacity * head_size);
        for (int band = 0; band < 2; ++band) units[band] = carver.take<float>(capacity);
        zeros_ = carver.take<float>(capacity);
        survivors_ = carver.take<uint16_t>(head_size + 2 * HALVES);
    }

    // Appends `count` vectors of a tile, from entry `first` on, as number n and following.
    void add_run(const Section<const uint8_t>& section, int first, int count, int n) {
        const int bytes = layout_.value_bytes();
        const uint8_t* source = section.values + int64_t(first) * bytes;
        const uint8_t* bitmap = section.bitmap + first * head_size_ / 8;
        uint16_t* out = rows + n * head_size_;
        if (is_integer(layout_.storage))
            return add_integers(source, bitmap, section.scales + first * scale_bytes(layout_.storage), count, n, out);
        for (int i = n; i < n + count; ++i) units[0][i] = 1;
        if (whole_ && layout_.storage == BFLOAT16) {
            memcpy(out, source, count * bytes);
        } else if (whole_) {
            to_bfloat16(source, count * bytes, reinterpret_cast<uint8_t*>(out));
        } else {
            for (int i = 0; i < count; ++i, source += bytes, bitmap += head_size_ / 8, out += head_size_) {
                if (layout_.storage == BFLOAT16) memcpy(survivors_, source, bytes);
                else to_bfloat16(source, bytes, reinterpret_cast<uint8_t*>(survivors_));
                place_halves(survivors_, bitmap, head_size_, out);
            }
        }
    }

    // Appends a row of bfloat16 as number n.
    void add_row(const uint8_t* row, int n) {
        uint16_t* out = rows + n * head_size_;
        for (int d = 0; d < head_size_; d += HALVES) _mm512_storeu_si512(out + d, _mm512_loadu_si512(row + 2 * d));
        for (int band = 0; band < bands; ++band) units[band][n] = 1;
    }

    // Appends a row of int8 as number n, and what it counts in.
    void add_codes(const int8_t* codes, float step, int n) {
        convert_codes(codes, head_size_, BFLOAT16, reinterpret_cast<uint8_t*>(rows + n * head_size_));
        for (int band = 0; band < bands; ++band) units[band][n] = step;
    }

    uint16_t* rows = nullptr;             // (capacity x head_size)
    float* units[2] = {nullptr, nullptr};  // what each row counts in: all of it, or each half
    int bands = 1;

  private:
    void add_integers(
        const uint8_t* source, const uint8_t* bitmap, const uint8_t* scales, int count, int n, uint16_t* out) {
        if (layout_.storage == INT4_INT2) return add_bands(source, scales, count, n, out);
        const bool has_nan = decode_scales(layout_.storage, scales, count, 1.f, units[0] + n, zeros_);
        if (!whole_) return add_pruned(source, bitmap, scales, count, n, out, has_nan);
        switch (layout_.storage) {
            case INT2: return add_whole<2>(source, scales, count, out);
            case INT3: return add_whole<3>(source, scales, count, out);
            default: return add_whole<4>(source, scales, count, out);
        }
    }

    template <int BITS>
    void add_whole(const uint8_t* source, const uint8_t* scales, int count, uint16_t* out) {
        const int bytes = layout_.value_bytes();
        for (int i = 0; i < count; ++i, source += bytes, out += head_size_)
            spread_halves<BITS>(source, scales + 2 * i, head_size_, out);
    }

    void add_bands(const uint8_t* source, const uint8_t* scales, int count, int n, uint16_t* out) {
        const int half = head_size_ / 2;
        for (int i = 0; i < count; ++i, source += layout_.value_bytes(), scales += 4, out += head_size_) {
            for (int band = 0; band < 2; ++band) units[band][n + i] = IntScale::read(scales + 2 * band).step;
            spread_halves<4>(source, scales, half, out);
            spread_halves<2>(source + half / 2, scales + 2, half, out + half);
        }
    }

    void add_pruned(const uint8_t* source, const uint8_t* bitmap, const uint8_t* scales, int count, int n,
                    uint16_t* out, bool has_nan) {
        const int survivors = layout_.survivors;
        for (int i = n; i < n + count; ++i, source += layout_.value_bytes(), scales += 2) {
            spread_halves<4>(source, scales, survivors, survivors_);
            if (has_nan && units[0][i] != units[0][i]) {  // must not reach what is pruned
                units[0][i] = 1;
                for (int d = 0; d < survivors; ++d) survivors_[d] = 0x7fc0;
            }
            place_halves(survivors_, bitmap, head_size_, out);
            bitmap += head_size_ / 8;
            out += head_size_;
        }
    }

    int head_size_ = 0;
    VectorLayout layout_{};
    bool whole_ = false;
    uint16_t* survivors_ = nullptr;
    float* zeros_ = nullptr;
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
