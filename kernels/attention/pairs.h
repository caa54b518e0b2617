// As fold.h, for many query rows of bfloat16 models, where processors multiply pairs of bfloat16, by tiles.h
// or dots.h: 16 rows of the query at a time, one a lane, so that softmax never sums over lanes.
//
// Queries, keys and values are bfloat16 without loss (halves.h), and weights are a sum of PARTS bfloat16
// numbers: of two they lose next to nothing; of one, where a product costs more, they are what vLLM's own
// attention rounds them to. Products are summed in float32.
#pragma once

#include "dots.h"
#include "fold.h"
#include "tiles.h"
#include "turn.h"

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

    static int capacity(Source) { return BATCH; }
    static bool differ(Source, Source) { return false; }

    void carve(Carver& carver) {
        const int rows = round_up(plan_.rows, TILE);
        rows_of_query_ = carver.take<uint16_t>(rows * size_);
        query_ = carver.take<uint32_t>(rows * size_ / 2);
        result = Accumulator(carver.take<float>(Accumulator::floats(rows, size_)), rows);
        weighted_ = carver.take<float>(rows * size_);
        seen_ = carver.take<Visible>(rows);
        scores_ = carver.take<float>(BATCH * TILE);
        other_scores_ = carver.take<float>(BATCH * TILE);
        for (int part = 0; part < PARTS; ++part) weights_[part] = carver.take<uint32_t>(BATCH / 2 * TILE);
        values_ = carver.take<uint16_t>(size_ * BATCH);
        key_units_ = carver.take<float>(BATCH);
        key_.carve(carver, BATCH, size_, layout_.key);
        value_.carve(carver, BATCH, size_, layout_.value);
    }

    void initialize() {}

    template <class Query>
    void begin(int queries, Query query) {
        const int width = plan_.group * size_;
        queries_ = queries;
        rows_ = queries * plan_.group;
        result.clear(round_up(rows_, TILE), size_);
        has_folded_ = false;
        for (int i = 0; i < queries; ++i) memcpy(rows_of_query_ + i * width, query(i), width * sizeof(uint16_t));
        memset(rows_of_query_ + rows_ * size_, 0, (round_up(rows_, TILE) - rows_) * size_ * sizeof(uint16_t));
        for (int row = 0; row < rows_; row += TILE)
            for (int d = 0; d < size_; d += PAIRS_DEPTH)
                turn16(rows_of_query_ + row * size_ + d, size_ / 2, query_ + (row * size_ + d * TILE) / 2, TILE);
        Products::begin();
    }

    void end() {
        Products::end();
        if (!has_folded_) return;
        for (int row = 0; row < rows_; row += TILE)
            for (int d = 0; d < size_; d += TILE)
                turn16(weighted_ + row * size_ + d * TILE, TILE, result.weighted + row * size_ + d, size_);
    }

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
    void fold(int n, Source, Seen visible, Ahead&) {
        const float scale = plan_.call.scale * LOG2_E;
        const int padded = round_up(n, PAIRS_DEPTH);
        if (!has_folded_) memset(weighted_, 0, round_up(rows_, TILE) * size_ * sizeof(float));
        has_folded_ = true;
        for (int i = 0; i < queries_; ++i) seen_[i] = visible(i);
        for (int i = 0; i < padded; i += LANES)
            store(key_units_ + i, key_.bands == 2 ? broadcast(scale) : load(key_.units[0] + i) * scale);
        for (int i = n; i < padded; ++i) value_.units[0][i] = 0;
        memset(value_.rows + n * size_, 0, (padded - n) * size_ * sizeof(uint16_t));
        turn_values(padded);
        for (int row = 0; row < rows_; row += TILE) {
            score(row, padded);
            if (plan_.call.soft_cap == 0) weigh<false>(row, padded);
            else weigh<true>(row, padded);
            Products::multiply(values_, BATCH, size_, weights_, padded, weighted_ + row * size_, true);
        }
    }

    Accumulator result{nullptr, 0};

  private:
    static constexpr int PARTS = Products::PARTS;

    // Elements by keys.
    void turn_values(int n) {
        for (int i = 0; i < n; i += PAIRS_DEPTH)
            for (int d = 0; d < size_; d += HALVES) {
                __m512i first[TILE], second[TILE];  // pairs of keys by elements
#pragma GCC unroll 16
                for (int j = 0; j < TILE; ++j) {
                    const uint16_t* row = value_.rows + (i + 2 * j) * size_ + d;
                    pair_rows(row, row + size_, first[j], second[j]);
                }
                turn16(first);
                turn16(second);
                for (int j = 0; j < TILE; ++j) {
                    uint16_t* out = values_ + (d + paired_element(j)) * BATCH + i;
                    _mm512_storeu_si512(out, first[j]);
                    _mm512_storeu_si512(out + 4 * BATCH, second[j]);
                }
            }
    }

    // Scores of n keys and 16 rows of the query, without units where the keys have one band.
    void score(int row, int n) {
        const int depth = size_ / key_.bands;
        uint32_t* const query[] = {query_ + row * size_ / 2};
        Products::multiply(key_.rows, size_, n, query, depth, scores_, false);
        if (key_.bands == 1) return;
        uint32_t* const other[] = {query[0] + depth / 2 * TILE};
        Products::multiply(key_.rows + depth, size_, n, other, depth, other_scores_, false);
        for (int i = 0; i < n; ++i) {
            float* scores = scores_ + i * TILE;
            store(scores, load(scores) * key_.units[0][i] + load(other_scores_ + i * TILE) * key_.units[1][i]);
        }
    }

    // Scores of 16 rows, from `first` on, to weights in parts; n is a multiple of 32.
    template <bool CAPPED>
    void weigh(int first, int n) {
        alignas(64) int32_t begin[TILE], end[TILE];
        bool all = true;
        for (int i = 0; i < TILE; ++i) {
            const int row = first + i < rows_ ? first + i : rows_ - 1;
            const Visible seen = seen_[row / plan_.group];
            begin[i] = seen.begin;
            end[i] = seen.end;
            all = all && seen.begin == 0 && seen.end == n;
        }
        const F greatest = all ? complete<CAPPED, false>(n, begin, end) : complete<CAPPED, true>(n, begin, end);
        float *maximum = result.maximum + first, *total = result.total + first;
        const F old = load(maximum);
        F now = max(greatest, old);
        if (_mm512_cmp_ps_mask(now, old, _CMP_NEQ_UQ)) {
            const F factor = old == -INFINITY ? F{} : exp2(old - now);
            store(maximum, now);
            store(total, load(total) * factor);
            for (float* sum = weighted_ + first * size_; sum < weighted_ + (first + TILE) * size_; sum += TILE)
                store(sum, load(sum) * factor);
        }
        const F shift = now == -INFINITY ? F{} : now;
        F sums[2] = {};
        for (int i = 0; i < n; i += 2) {
            F weights[2];
            for (int j = 0; j < 2; ++j) {
                weights[j] = exp2(load(scores_ + (i + j) * TILE) - shift);
                sums[j] += weights[j];
                weights[j] *= value_.units[0][i + j];
            }
            store_pairs(weights, i / 2 * TILE);
        }
        store(total, load(total) + (sums[0] + sums[1]));
    }

    // Applies units, cap and mask; returns the largest score of each row.
    template <bool CAPPED, bool MASKED>
    F complete(int n, const int32_t* begin, const int32_t* end) {
        const float soft_cap = plan_.call.soft_cap * LOG2_E;
        const __m512i first = _mm512_load_si512(begin), last = _mm512_load_si512(end);
        F greatest[2] = {broadcast(-INFINITY), broadcast(-INFINITY)};
        for (int i = 0; i < n; i += 2)
            for (int j = 0; j < 2; ++j) {
                float* scores = scores_ + (i + j) * TILE;
                F score = load(scores) * key_units_[i + j];
                if constexpr (CAPPED) score = soft_cap * tanh(score * (1 / soft_cap));
                if constexpr (MASKED) {
                    const __m512i key = _mm512_set1_epi32(i + j);
                    const __mmask16 seen = _mm512_cmple_epi32_mask(first, key) & _mm512_cmpgt_epi32_mask(last, key);
                    score = _mm512_mask_blend_ps(seen, broadcast(-INFINITY), score);
                }
                store(scores, score);
                greatest[j] = max(score, greatest[j]);
            }
        return max(greatest[0], greatest[1]);
    }

    // The weights of two keys; each part is what the ones before leave, rounded.
    void store_pairs(F (&weights)[2], int at) {
        const I upper = I{} + int32_t(0xffff0000), half = I{} + 0x8000;
        for (int part = 0; part < PARTS; ++part) {
            I bits[2];
            for (int i = 0; i < 2; ++i) {
                bits[i] = float_to_bits(weights[i]) + half;
                weights[i] -= bits_to_float(bits[i] & upper);
            }
            const I low = (I)_mm512_srli_epi32((__m512i)bits[0], 16);
            _mm512_storeu_si512(weights_[part] + at, (__m512i)(low | (bits[1] & upper)));
        }
    }

    const Plan& plan_;
    const Layout& layout_;
    const int size_;
    int queries_ = 0, rows_ = 0;
    bool has_folded_ = false;
    uint16_t* rows_of_query_ = nullptr;  // (rows x head_size)
    uint32_t* query_ = nullptr;          // of every 16 rows: (pairs of elements x rows)
    float* weighted_ = nullptr;          // of every 16 rows: (elements x rows); the result's, once there are keys
    Visible* seen_ = nullptr;            // of each query
    float *scores_ = nullptr, *other_scores_ = nullptr;  // (keys x 16 rows)
    float* key_units_ = nullptr;
    uint32_t* weights_[PARTS];    // (pairs of keys x 16 rows)
    uint16_t* values_ = nullptr;  // (elements x BATCH keys)
    Halves key_, value_;
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
