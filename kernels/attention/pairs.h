// As fold.h, for many query rows of bfloat16 models, where processors multiply pairs of bfloat16: 16 rows
// of the query at a time, by tiles.h or dots.h.
//
// Nothing is rounded that fold.h does not round: queries, keys and values are bfloat16 without loss
// (halves.h), and weights are a sum of two bfloat16 numbers. Products are summed in float32.
#pragma once

#include "dots.h"
#include "fold.h"
#include "tiles.h"

#if defined(__AVX512BF16__)

namespace sparsekv::SPARSEKV_ISA {

// `Products` is Tiles or Dots.
template <class Products>
class PairFold {
  public:
    static constexpr int BATCH = PAIR_BATCH;

    static bool serves(const Plan& plan) {
        const Layout& layout = plan.call.layout;
        const int multiple = layout.key.storage == INT4_INT2 ? 2 * PAIRS_DEPTH : PAIRS_DEPTH;
        return plan.rows >= MATRIX_ROWS && layout.storage == BFLOAT16 && layout.head_size % multiple == 0;
    }

    explicit PairFold(const Plan& plan) : plan_(plan), layout_(plan.call.layout), size_(layout_.head_size) {}

    void carve(Carver& carver) {
        const int rows = round_up(plan_.rows, TILE);
        query_ = carver.take<uint16_t>(rows * size_);
        result = Accumulator(carver.take<float>(Accumulator::floats(rows, size_)), rows);
        scores_ = carver.take<float>(TILE * BATCH);
        other_scores_ = carver.take<float>(TILE * BATCH);
        columns_ = carver.take<uint32_t>(BATCH * size_ / 2);
        for (uint16_t*& weights : weights_) weights = carver.take<uint16_t>(TILE * BATCH);
        pairs_ = carver.take<uint32_t>(BATCH / 2 * size_);
        key_units_ = carver.take<float>(BATCH);
        key_.carve(carver, BATCH, size_, layout_.key);
        value_.carve(carver, BATCH, size_, layout_.value);
    }

    void initialize() {}

    template <class Query>
    void begin(int queries, Query query) {
        rows_ = queries * plan_.group;
        result.clear(rows_, size_);
        Products::begin(rows_ < TILE ? rows_ : TILE);
        const int width = plan_.group * size_;
        for (int i = 0; i < queries; ++i) memcpy(query_ + i * width, query(i), width * sizeof(uint16_t));
    }

    void end() { Products::end(); }

    void add_run(const Tile<const uint8_t>& tile, int first, int count, int n, bool, Ahead& ahead) {
        ahead.fetch(2 * count);
        key_.add_run(tile.key, first, count, n);
        value_.add_run(tile.value, first, count, n);
    }

    void add_row(const uint8_t* key, const uint8_t* value, int n) {
        key_.add_row(key, n);
        value_.add_row(value, n);
    }

    void add_codes(const int8_t* key, const int8_t* value, float key_step, float value_step, int n) {
        key_.add_codes(key, key_step, n);
        value_.add_codes(value, value_step, n);
    }

    template <class Seen>
    void fold(int n, bool, Seen visible, Ahead&) {
        const float scale = plan_.call.scale * LOG2_E;
        for (int i = 0; i < BATCH; i += LANES)
            store(key_units_ + i, key_.bands == 2 ? broadcast(scale) : load(key_.units[0] + i) * scale);
        memset(value_.rows + n * size_, 0, (round_up(n, PAIRS_DEPTH) - n) * size_ * sizeof(uint16_t));
        pair_values(n);
        turn_keys(n);
        for (int row = 0; row < rows_; row += TILE) {
            score(row, n);
            weigh(row, n, visible);
            Products::add(weights_[0], weights_[1], rows_from(row), pairs_, n, size_, result.weighted + row * size_);
        }
    }

    Accumulator result{nullptr, 0};

  private:
    // To pairs of the keys' elements, see column_tile().
    void turn_keys(int n) {
        for (int i = 0; i < n; i += TILE)
            for (int d = 0; d < size_; d += PAIRS_DEPTH)
                transpose16(key_.rows + i * size_ + d, size_, columns_ + column_tile(i, d));
    }

    // 16 rows of 16 pairs.
    static void transpose16(const uint16_t* rows, int stride, uint32_t* out) {
        __m512i a[TILE], b[TILE];
        for (int i = 0; i < TILE; ++i) a[i] = _mm512_loadu_si512(rows + i * stride);
        for (int i = 0; i < TILE; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < TILE; i += 4)
            for (int j = 0; j < 2; ++j) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
            }
        // a[4 i + j] has columns j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3.
        for (int j = 0; j < 4; ++j) {
            const __m512i low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), high = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
            const __m512i low2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
            const __m512i high2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
            _mm512_storeu_si512(out + j * TILE, _mm512_shuffle_i32x4(low, low2, 0x88));
            _mm512_storeu_si512(out + (j + 4) * TILE, _mm512_shuffle_i32x4(high, high2, 0x88));
            _mm512_storeu_si512(out + (j + 8) * TILE, _mm512_shuffle_i32x4(low, low2, 0xdd));
            _mm512_storeu_si512(out + (j + 12) * TILE, _mm512_shuffle_i32x4(high, high2, 0xdd));
        }
    }

    // Scores of 16 rows of the query and n keys, without units where the keys have one band.
    void score(int row, int n) {
        const int depth = size_ / key_.bands;
        score_band(row, n, 0, depth, scores_);
        if (key_.bands == 1) return;
        score_band(row, n, depth, size_, other_scores_);
        for (int i = 0; i < TILE * BATCH; i += LANES) {
            const F units = load(key_.units[0] + i % BATCH), others = load(key_.units[1] + i % BATCH);
            store(scores_ + i, load(scores_ + i) * units + load(other_scores_ + i) * others);
        }
    }

    void score_band(int row, int n, int first, int last, float* scores) {
        Products::score(query_ + row * size_, size_, rows_from(row), columns_, n, first, last, scores);
    }

    // Of a tile.
    int rows_from(int row) const { return rows_ - row < TILE ? rows_ - row : TILE; }

    // Scores to weights in two parts, of 16 rows; those past the n keys are 0.
    template <class Seen>
    void weigh(int first, int n, Seen visible) {
        const float soft_cap = plan_.call.soft_cap * LOG2_E;
        __mmask16 keys[BATCH / LANES];
        for (int i = 0; i < BATCH / LANES; ++i) {
            const int left = n - i * LANES;
            keys[i] = static_cast<__mmask16>(left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
        }
        for (int row = first; row < first + TILE && row < rows_; ++row) {
            float* scores = scores_ + (row - first) * BATCH;
            const Visible seen = visible(row / plan_.group);
            result.weigh(scores, row, seen, n, size_, key_units_, value_.units[0], soft_cap);
            for (int i = 0; i < round_up(n, PAIRS_DEPTH); i += 2 * LANES) {
                const F low = _mm512_maskz_loadu_ps(keys[i / LANES], scores + i);
                const F high = _mm512_maskz_loadu_ps(keys[i / LANES + 1], scores + i + LANES);
                const __m512i main = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                const __m512i rest = (__m512i)_mm512_cvtne2ps_pbh(
                    high - widen(_mm512_extracti64x4_epi64(main, 1)), low - widen(_mm512_castsi512_si256(main)));
                _mm512_storeu_si512(weights_[0] + (row - first) * BATCH + i, main);
                _mm512_storeu_si512(weights_[1] + (row - first) * BATCH + i, rest);
            }
        }
    }

    static F widen(__m256i halves) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    // Two rows of values to one of pairs.
    void pair_values(int n) {
        alignas(64) static constexpr struct Order {
            uint16_t low[32]{}, high[32]{};
            constexpr Order() {
                for (int i = 0; i < 32; ++i) {
                    low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
                    high[i] = static_cast<uint16_t>(low[i] + 16);
                }
            }
        } ORDER;
        const __m512i low = _mm512_loadu_si512(ORDER.low), high = _mm512_loadu_si512(ORDER.high);
        for (int i = 0; i < round_up(n, PAIRS_DEPTH); i += 2) {
            const uint16_t* row = value_.rows + i * size_;
            uint32_t* out = pairs_ + i / 2 * size_;
            for (int d = 0; d < size_; d += HALVES) {
                const __m512i even = _mm512_loadu_si512(row + d), odd = _mm512_loadu_si512(row + size_ + d);
                _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_storeu_si512(out + d + TILE, _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }

    const Plan& plan_;
    const Layout& layout_;
    const int size_;
    int rows_ = 0;
    uint16_t* query_ = nullptr;    // (rows x head_size)
    uint32_t* columns_ = nullptr;  // of keys, see turn_keys()
    float *scores_ = nullptr, *other_scores_ = nullptr, *key_units_ = nullptr;
    uint16_t* weights_[2] = {nullptr, nullptr};
    uint32_t* pairs_ = nullptr;  // of values, (BATCH / 2 x head_size)
    Halves key_, value_;
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
