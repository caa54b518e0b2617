// Collects the keys, or the values, that are attended together, in packed form: copied to working
// memory, which the expanding functions may read past, or read in place where that is safe. Keys of
// two bands become dense rows at once.
#pragma once

#include "../cpu/fp8.h"
#include "../cpu/layout.h"
#include "../cpu/scratch.h"
#include "matrix.h"

namespace sparsekv::SPARSEKV_ISA {

class Batch {
  public:
    // `model_storage` is that of dense rows.
    void carve(Carver& carver, int head_size, int model_storage, const VectorLayout& layout) {
        head_size_ = head_size;
        model_storage_ = model_storage;
        layout_ = layout;
        whole_ = layout.survivors == head_size;
        const size_t row = head_size * sizeof(float);
        values_ = carver.take<uint8_t>(BATCH * row + row + OVERREAD);
        bitmap_ = carver.take<uint8_t>(BATCH * head_size / 8);
        units_ = carver.take<float>(BATCH);
        row_units_ = carver.take<float>(BATCH);
        ones_ = carver.take<float>(BATCH);
        zeros_ = carver.take<float>(BATCH);
        scales_ = carver.take<uint8_t>(BATCH * sizeof(uint16_t));
        exact_ = layout.storage == INT4 ? carver.take<float>(BATCH * head_size) : nullptr;
    }

    // Once the memory is there.
    void initialize() {
        for (int i = 0; i < BATCH; ++i) {
            ones_[i] = 1;
            row_units_[i] = 1;
            units_[i] = 1;
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
        if (layout_.storage == INT4_INT2) {
            add_bands(source, section.scales + first * scale_bytes(INT4_INT2), count, n);
            return;
        }
        if (is_integer(layout_.storage))
            add_scales(section.scales + first * scale_bytes(layout_.storage), count, n);
        if (in_place && !is_spread()) {
            place_ = {source, bitmap};
            return;
        }
        if (!whole_) memcpy(bitmap_ + n * bitmap_bytes, bitmap, count * bitmap_bytes);
        uint8_t* out = values_ + n * stride();
        if (!is_spread()) memcpy(out, source, count * bytes);
        else if (layout_.storage == FP8) to_bfloat16(source, count * bytes, out);
        else
            for (int i = 0; i < count; ++i, source += bytes, out += 2 * bytes)
                to_eighths(source, bytes, static_cast<int>(zeros_[n + i] * 8), out);
    }

    // Appends a row of the model dtype as number n.
    void add_row(const uint8_t* row, int n) {
        uint8_t* out = values_ + n * row_bytes();
        for (int i = 0; i < row_bytes(); i += 32) memcpy(out + i, row + i, 32);  // 16 elements at least
        row_units_[n] = 1;
    }

    // Appends a row of int8 as number n, which the model dtype holds without loss, and what it counts in.
    void add_codes(const int8_t* codes, float step, int n) {
        convert_codes(codes, head_size_, model_storage_, values_ + n * row_bytes());
        row_units_[n] = step;
    }

    // What was collected: dense rows, or pruned vectors.
    int storage(bool dense) const {
        if (dense) return model_storage_ == FLOAT32 ? DENSE : model_storage_ + WHOLE;
        if (layout_.storage == INT4_INT2 || has_nan_ || (whole_ && layout_.storage == FLOAT32)) return DENSE;
        const int storage = layout_.storage == FP8 ? int(BFLOAT16) : layout_.storage;
        return whole_ ? storage + WHOLE : storage;
    }

    Vectors vectors(bool dense, int n) {
        const int64_t row = int64_t(head_size_) * sizeof(float);
        if (dense) return {values_, bitmap_, row_bytes(), row_units_, zeros_, scales_};
        if (layout_.storage == INT4_INT2) return {values_, bitmap_, row, ones_, zeros_, scales_};
        if (!has_nan_) return {place_.values, place_.bitmap, stride(), units_, zeros_, scales_};
        // Element by element: a NaN unit would spoil the zeros of pruned elements.
        for (int i = 0; i < n; ++i) {
            const uint8_t* survivor = values_ + i * stride();
            for (int d = 0; d < head_size_; ++d) {
                const bool kept = bitmap_[(i * head_size_ + d) / 8] >> d % 8 & 1;
                const float unit = units_[i] / INT4_UNIT;
                exact_[i * head_size_ + d] = kept ? static_cast<int8_t>(*survivor++) * unit : 0.f;
            }
        }
        return {reinterpret_cast<const uint8_t*>(exact_), bitmap_, row, ones_, zeros_, scales_};
    }

  private:
    int row_bytes() const { return head_size_ * storage_bits(model_storage_) / 8; }

    // Whether survivors take more bytes here than in their page.
    bool is_spread() const { return layout_.storage == FP8 || (layout_.storage == INT4 && !whole_); }
    int stride() const { return is_spread() ? 2 * layout_.value_bytes() : layout_.value_bytes(); }

    void add_bands(const uint8_t* source, const uint8_t* scales, int count, int n) {
        const int half = head_size_ / 2;
        float* out = reinterpret_cast<float*>(values_) + n * head_size_;
        for (int i = 0; i < count; ++i, source += layout_.value_bytes(), out += head_size_) {
            expand_codes<4>(source, IntScale::read(scales), half, out);
            expand_codes<2>(source + half / 2, IntScale::read(scales + 2), half, out + half);
            scales += scale_bytes(INT4_INT2);
        }
    }

    // The values of `size` codes, a multiple of LANES. May read 2 bytes more.
    template <int BITS>
    static void expand_codes(const uint8_t* codes, IntScale scale, int size, float* out) {
        const F step = broadcast(scale.step), zero = broadcast(scale.step * scale.zero / (1 << (7 - BITS)));
        for (int d = 0; d < size; d += LANES, codes += LANES * BITS / 8)
            store(out + d, spread_codes<BITS>(codes) * step - zero);
    }

    // A NaN step spoils the whole vector, so it needs care only where some elements are pruned.
    void add_scales(const uint8_t* scales, int count, int n) {
        const float unit = whole_ ? 1.f : INT4_UNIT / 8;
        memcpy(scales_ + n * sizeof(uint16_t), scales, count * sizeof(uint16_t));
        has_nan_ |= decode_scales(layout_.storage, scales, count, unit, units_ + n, zeros_ + n) && !whole_;
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
            store_pairs(even, odd, out + 2 * i);
        }
#else
        for (int i = 0; i < bytes; ++i) {
            out[2 * i] = static_cast<uint8_t>((source[i] & 15) * 8 - zero);
            out[2 * i + 1] = static_cast<uint8_t>((source[i] >> 4) * 8 - zero);
        }
#endif
    }

    int head_size_ = 0, model_storage_ = 0;
    VectorLayout layout_{};
    uint8_t *values_ = nullptr, *bitmap_ = nullptr, *scales_ = nullptr;
    struct {
        const uint8_t *values, *bitmap;
    } place_{};
    float *units_ = nullptr, *row_units_ = nullptr, *ones_ = nullptr, *zeros_ = nullptr;
    float* exact_ = nullptr;
    bool has_nan_ = false, whole_ = false;
};

}  // namespace sparsekv::SPARSEKV_ISA
