// Collects the keys, or the values, that are attended together, in packed form: copied to working
// memory, which the expanding functions may read past, or read in place where that is safe.
#pragma once

#include "../cpu/layout.h"
#include "../cpu/scratch.h"
#include "matrix.h"

namespace sparsekv {

class Batch {
  public:
    void carve(Carver& carver, int head_size, const VectorLayout& layout) {
        head_size_ = head_size;
        layout_ = layout;
        whole_ = layout.survivors == head_size;
        const size_t row = head_size * sizeof(float);
        values_ = carver.take<uint8_t>(BATCH * row + row + OVERREAD);
        bitmap_ = carver.take<uint8_t>(BATCH * head_size / 8);
        units_ = carver.take<float>(BATCH);
        ones_ = carver.take<float>(BATCH);
        exact_ = layout.storage >= FP8 ? carver.take<float>(BATCH * head_size) : nullptr;
    }

    void begin() {
        has_nan_ = false;
        place_ = {values_, bitmap_};
        if (whole_) memset(bitmap_, 0xff, BATCH * head_size_ / 8);
        for (int i = 0; i < BATCH; ++i) {
            ones_[i] = 1;
            units_[i] = expand_unit(layout_.storage);
        }
    }

    // Appends `count` pruned vectors of a tile, from entry `first` on, as number n and following. With
    // `in_place` they are all of the batch, and memory is readable past the section.
    void add_run(const Section<const uint8_t>& section, int first, int count, int n, bool in_place) {
        const int bytes = layout_.value_bytes(), bitmap_bytes = head_size_ / 8;
        const uint8_t* source = section.values + int64_t(first) * bytes;
        const uint8_t* bitmap = section.bitmap + first * bitmap_bytes;
        if (layout_.storage == FP8) has_nan_ |= any_fp8_nan(source, count * bytes);
        if (in_place && layout_.storage != INT4) {
            place_ = {source, whole_ ? bitmap_ : bitmap};
            return;
        }
        if (!whole_) memcpy(bitmap_ + n * bitmap_bytes, bitmap, count * bitmap_bytes);
        if (layout_.storage != INT4) {
            memcpy(values_ + n * bytes, source, count * bytes);
            return;
        }
        uint8_t* eighths = values_ + n * layout_.survivors;
        for (int i = 0; i < count; ++i, source += bytes, eighths += layout_.survivors) {
            const Int4Scale scale = Int4Scale::read(section.scales + (first + i) * scale_bytes(INT4));
            units_[n + i] = scale.step / 8 * expand_unit(INT4);
            has_nan_ |= scale.step != scale.step;
            to_eighths(source, bytes, scale.zero, eighths);
        }
    }

    // Appends a row of the model dtype as number n.
    void add_row(int model_storage, const uint8_t* row, int n) {
        decode_row(model_storage, row, head_size_, reinterpret_cast<float*>(values_) + n * head_size_);
    }

    // What was collected: dense rows, or pruned vectors.
    int storage(bool dense) const { return dense || has_nan_ ? DENSE : layout_.storage; }

    Vectors vectors(bool dense, int n) {
        const int64_t row = int64_t(head_size_) * sizeof(float);
        if (dense) return {values_, bitmap_, row, ones_};
        const int bytes = layout_.survivors * survivor_bytes(layout_.storage);
        if (!has_nan_) return {place_.values, place_.bitmap, bytes, units_};
        // Element by element: the fast expansion knows no NaN.
        for (int i = 0; i < n; ++i) {
            const uint8_t* survivor = place_.values + i * bytes;
            for (int d = 0; d < head_size_; ++d) {
                const bool kept = place_.bitmap[(i * head_size_ + d) / 8] >> d % 8 & 1;
                exact_[i * head_size_ + d] = kept ? exact(*survivor++, i) : 0.f;
            }
        }
        return {reinterpret_cast<const uint8_t*>(exact_), bitmap_, row, ones_};
    }

  private:
    // int4 codes, two a byte, to 8 * code - zero. May read 15 bytes more, which the scales that
    // follow in every tile cover, and write 30.
    static void to_eighths(const uint8_t* source, int bytes, int zero, uint8_t* out) {
#if defined(__AVX2__)
        const __m128i low_bits = _mm_set1_epi8(15), zeros = _mm_set1_epi8(static_cast<char>(zero));
        for (int i = 0; i < bytes; i += 16) {
            const __m128i x = _mm_loadu_si128((const __m128i*)(source + i));
            const __m128i even = _mm_and_si128(x, low_bits), odd = _mm_and_si128(_mm_srli_epi16(x, 4), low_bits);
            const __m128i first = _mm_slli_epi16(_mm_unpacklo_epi8(even, odd), 3);
            const __m128i second = _mm_slli_epi16(_mm_unpackhi_epi8(even, odd), 3);
            _mm_storeu_si128((__m128i*)(out + 2 * i), _mm_sub_epi8(first, zeros));
            _mm_storeu_si128((__m128i*)(out + 2 * i + 16), _mm_sub_epi8(second, zeros));
        }
#else
        for (int i = 0; i < bytes; ++i) {
            out[2 * i] = static_cast<uint8_t>((source[i] & 15) * 8 - zero);
            out[2 * i + 1] = static_cast<uint8_t>((source[i] >> 4) * 8 - zero);
        }
#endif
    }

    float exact(uint8_t survivor, int i) const {
        if (layout_.storage == FP8) return fp8_to_float(survivor);
        return static_cast<int8_t>(survivor) * (units_[i] / expand_unit(INT4));
    }

    static bool any_fp8_nan(const uint8_t* p, int count) {
        uint8_t found = 0;
        for (int i = 0; i < count; ++i) found |= (p[i] & 0x7f) == 0x7f;
        return found;
    }

    int head_size_ = 0;
    VectorLayout layout_{};
    uint8_t *values_ = nullptr, *bitmap_ = nullptr;
    struct {
        const uint8_t *values, *bitmap;
    } place_{};
    float *units_ = nullptr, *ones_ = nullptr;
    float* exact_ = nullptr;
    bool has_nan_ = false, whole_ = false;
};

}  // namespace sparsekv
