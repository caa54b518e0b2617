// Collects the keys, or the values, that are attended together: a copy of their packed form in
// working memory, which the expanding functions may read past.
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
        const size_t row = head_size * sizeof(float);
        values_ = carver.take<uint8_t>(BATCH * row + row + OVERREAD);
        bitmap_ = carver.take<uint8_t>(BATCH * head_size / 8);
        scales_ = carver.take<Int4Scale>(BATCH);
        exact_ = layout.storage == FP8 ? carver.take<float>(BATCH * head_size) : nullptr;
    }

    // Appends `count` pruned vectors of a tile, from entry `first` on, as number n and following.
    void add_run(const Section<const uint8_t>& section, int first, int count, int n) {
        const int bytes = layout_.value_bytes(), bitmap_bytes = head_size_ / 8;
        const uint8_t* source = section.values + int64_t(first) * bytes;
        memcpy(bitmap_ + n * bitmap_bytes, section.bitmap + first * bitmap_bytes, count * bitmap_bytes);
        if (layout_.storage != INT4) {
            memcpy(values_ + n * bytes, source, count * bytes);
            if (layout_.storage == FP8) has_nan_ |= any_fp8_nan(source, count * bytes);
            return;
        }
        uint8_t* codes = values_ + n * layout_.survivors;
        for (int i = 0; i < count * bytes; ++i) {
            codes[2 * i] = source[i] & 15;
            codes[2 * i + 1] = source[i] >> 4;
        }
        for (int i = 0; i < count; ++i)
            scales_[n + i] = Int4Scale::read(section.scales + (first + i) * scale_bytes(INT4));
    }

    // Appends a row of the model dtype as number n.
    void add_row(int model_storage, const uint8_t* row, int n) {
        decode_row(model_storage, row, head_size_, reinterpret_cast<float*>(values_) + n * head_size_);
    }

    // What was collected: dense rows, or pruned vectors.
    int storage(bool dense) const { return dense || has_nan_ ? DENSE : layout_.storage; }

    Vectors vectors(bool dense, int n) {
        if (dense) return {values_, bitmap_, scales_, int64_t(head_size_) * 4};
        const int bytes = layout_.survivors * survivor_bytes(layout_.storage);
        if (!has_nan_) return {values_, bitmap_, scales_, bytes};
        // Vector by vector as the reference does: the fast expansion of fp8 has no NaN.
        for (int i = 0; i < n; ++i) {
            const uint8_t* survivor = values_ + i * bytes;
            for (int d = 0; d < head_size_; ++d) {
                const bool kept = bitmap_[(i * head_size_ + d) / 8] >> d % 8 & 1;
                exact_[i * head_size_ + d] = kept ? fp8_to_float(*survivor++) : 0.f;
            }
        }
        return {reinterpret_cast<const uint8_t*>(exact_), bitmap_, scales_, int64_t(head_size_) * 4};
    }

    void clear() { has_nan_ = false; }

  private:
    static bool any_fp8_nan(const uint8_t* p, int count) {
        uint8_t found = 0;
        for (int i = 0; i < count; ++i) found |= (p[i] & 0x7f) == 0x7f;
        return found;
    }

    int head_size_ = 0;
    VectorLayout layout_{};
    uint8_t *values_ = nullptr, *bitmap_ = nullptr;
    Int4Scale* scales_ = nullptr;
    float* exact_ = nullptr;
    bool has_nan_ = false;
};

}  // namespace sparsekv
