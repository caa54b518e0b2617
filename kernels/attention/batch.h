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
        zeros_ = carver.take<float>(BATCH);
        exact_ = layout.storage >= FP8 ? carver.take<float>(BATCH * head_size) : nullptr;
    }

    // Once the memory is there.
    void initialize() {
        for (int i = 0; i < BATCH; ++i) {
            ones_[i] = 1;
            units_[i] = expand_unit(layout_.storage);
            zeros_[i] = 0;
        }
        begin();
    }

    void begin() {
        has_nan_ = false;
        place_ = {values_, bitmap_};
    }

    // Appends `count` pruned vectors of a tile, from entry `first` on, as number n and following. With
    // `in_place` they are all of the batch, and memory is readable past the section.
    void add_run(const Section<const uint8_t>& section, int first, int count, int n, bool in_place) {
        const int bytes = layout_.value_bytes(), bitmap_bytes = head_size_ / 8;
        const uint8_t* source = section.values + int64_t(first) * bytes;
        const uint8_t* bitmap = section.bitmap + first * bitmap_bytes;
        if (layout_.storage == FP8) has_nan_ |= any_fp8_nan(source, count * bytes);
        if (layout_.storage == INT4) add_scales(section.scales + first * scale_bytes(INT4), count, n);
        if (in_place && !is_spread()) {
            place_ = {source, bitmap};
            return;
        }
        if (!whole_) memcpy(bitmap_ + n * bitmap_bytes, bitmap, count * bitmap_bytes);
        if (!is_spread()) {
            memcpy(values_ + n * bytes, source, count * bytes);
            return;
        }
        uint8_t* eighths = values_ + n * layout_.survivors;
        for (int i = 0; i < count; ++i, source += bytes, eighths += layout_.survivors)
            to_eighths(source, bytes, static_cast<int>(zeros_[n + i] * 8), eighths);
    }

    // Appends a row of the model dtype as number n.
    void add_row(int model_storage, const uint8_t* row, int n) {
        decode_row(model_storage, row, head_size_, reinterpret_cast<float*>(values_) + n * head_size_);
    }

    // What was collected: dense rows, or pruned vectors.
    int storage(bool dense) const {
        if (dense || has_nan_ || (whole_ && layout_.storage == FLOAT32)) return DENSE;
        return whole_ ? layout_.storage + WHOLE : layout_.storage;
    }

    Vectors vectors(bool dense, int n) {
        const int64_t row = int64_t(head_size_) * sizeof(float);
        if (dense) return {values_, bitmap_, row, ones_, zeros_};
        const int bytes = is_spread() ? layout_.survivors : layout_.value_bytes();
        if (!has_nan_) return {place_.values, place_.bitmap, bytes, units_, zeros_};
        // Element by element: the fast expansion knows no NaN.
        for (int i = 0; i < n; ++i) {
            const uint8_t* survivor = place_.values + i * bytes;
            for (int d = 0; d < head_size_; ++d) {
                const bool kept = whole_ || place_.bitmap[(i * head_size_ + d) / 8] >> d % 8 & 1;
                exact_[i * head_size_ + d] = kept ? exact(*survivor++, i) : 0.f;
            }
        }
        return {reinterpret_cast<const uint8_t*>(exact_), bitmap_, row, ones_, zeros_};
    }

  private:
    // Whether survivors are copied from two a byte to one a byte.
    bool is_spread() const { return layout_.storage == INT4 && !whole_; }

    // A NaN step spoils the whole vector, so it needs care only where some elements are pruned.
    void add_scales(const uint8_t* scales, int count, int n) {
        const float unit = whole_ ? 1.f : expand_unit(INT4) / 8;
        has_nan_ |= decode_scales(scales, count, unit, units_ + n, zeros_ + n) && !whole_;
    }

    // int4 codes, two a byte, to 8 * code - zero. May read 30 bytes more, which the scales that
    // follow in every tile cover, and write 60.
    static void to_eighths(const uint8_t* source, int bytes, int zero, uint8_t* out) {
#if defined(__AVX2__)
        const __m256i eights = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120));
        const __m256i table = _mm256_sub_epi8(eights, _mm256_set1_epi8(static_cast<char>(zero)));
        const __m256i low_bits = _mm256_set1_epi8(15);
        for (int i = 0; i < bytes; i += 32) {
            const __m256i x = _mm256_loadu_si256((const __m256i*)(source + i));
            const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low_bits));
            const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low_bits));
            const __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
            __m128i* to = (__m128i*)(out + 2 * i);
            _mm_storeu_si128(to, _mm256_castsi256_si128(first));
            _mm_storeu_si128(to + 1, _mm256_castsi256_si128(second));
            _mm_storeu_si128(to + 2, _mm256_extracti128_si256(first, 1));
            _mm_storeu_si128(to + 3, _mm256_extracti128_si256(second, 1));
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
    float *units_ = nullptr, *ones_ = nullptr, *zeros_ = nullptr;
    float* exact_ = nullptr;
    bool has_nan_ = false, whole_ = false;
};

}  // namespace sparsekv
