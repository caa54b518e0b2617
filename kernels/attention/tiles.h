// As fold.h, for bfloat16 models, by the tile registers of AMX: 16 rows of 64 bytes each.
//
// Nothing is rounded that fold.h does not round: queries, keys and values are bfloat16 without loss
// (halves.h), and weights are a sum of two bfloat16 numbers. Products are summed in float32.
#pragma once

#include "fold.h"
#include "halves.h"

#if defined(__AMX_BF16__)

namespace sparsekv::SPARSEKV_ISA {

constexpr int TILE = 16;         // rows of a tile register, and 32-bit elements of a row
constexpr int PAIRS_DEPTH = 32;  // what one product of tiles sums over

class TileFold {
  public:
    static bool serves(const Layout& layout) {
        const bool bands = layout.key.storage == INT4_INT2;
        return layout.storage == BFLOAT16 && layout.head_size % (bands ? 2 * PAIRS_DEPTH : PAIRS_DEPTH) == 0;
    }

    explicit TileFold(const Plan& plan) : plan_(plan), layout_(plan.call.layout), size_(layout_.head_size) {}

    void carve(Carver& carver) {
        const int rows = round_up(plan_.rows, TILE);
        query_ = carver.take<uint32_t>(rows * size_ / 2);
        result = Accumulator(carver.take<float>(Accumulator::floats(rows, size_)), rows);
        scores_ = carver.take<float>(rows * BATCH);
        columns_ = carver.take<float>(2 * BATCH * TILE);
        for (uint16_t*& weights : weights_) weights = carver.take<uint16_t>(rows * BATCH);
        pairs_ = carver.take<uint32_t>(BATCH / 2 * size_);
        key_units_ = carver.take<float>(BATCH);
        key_.carve(carver, size_, layout_.key);
        value_.carve(carver, size_, layout_.value);
    }

    void initialize() {}

    template <class Query>
    void begin(int queries, Query query) {
        queries_ = queries;
        rows_ = queries * plan_.group;
        result.clear(rows_, size_);
        configure(rows_ < TILE ? rows_ : TILE);
        memset(query_, 0, size_t(round_up(rows_, TILE)) * size_ * 2);
        for (int row = 0; row < rows_; ++row) {
            const uint8_t* source = query(row / plan_.group) + int64_t(row % plan_.group) * size_ * 2;
            uint32_t* column = query_ + row / TILE * TILE * (size_ / 2) + row % TILE;
            for (int d = 0; d < size_ / 2; ++d) memcpy(column + d * TILE, source + 4 * d, 4);
        }
    }

    void end() { _tile_release(); }

    void add_run(const Tile<const uint8_t>& tile, int first, int count, int n, bool) {
        key_.add_run(tile.key, first, count, n);
        value_.add_run(tile.value, first, count, n);
    }

    void add_row(const uint8_t* key, const uint8_t* value, int n) {
        key_.add_row(key, n);
        value_.add_row(value, n);
    }

    template <class Seen>
    void fold(int n, bool, Seen visible, Ahead& ahead) {
        ahead.fetch(2 * n);
        const float scale = plan_.call.scale * LOG2_E;
        for (int i = 0; i < BATCH; i += LANES)
            store(key_units_ + i, key_.bands == 2 ? broadcast(scale) : load(key_.units[0] + i) * scale);
        for (int row = 0; row < rows_; row += TILE) score(row, n);
        weigh(n, visible);
        memset(value_.rows + n * size_, 0, (round_up(n, PAIRS_DEPTH) - n) * size_ * sizeof(uint16_t));
        pair_values(n);
        for (int row = 0; row < rows_; row += TILE) add_values(row, n);
    }

    Accumulator result{nullptr, 0};

  private:
    // Registers 0 and 1: scores, keys by queries. 2: keys. 3: queries, or pairs of values. 4 and 5:
    // results, queries by elements. 6 and 7: the two parts of weights.
    static void configure(int rows) {
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = 64;
            config.rows[i] = static_cast<uint8_t>(i >= 4 ? rows : TILE);
        }
        asm volatile("" : : "r"(&config) : "memory");  // the compiler believes that 8 bytes are read
        _tile_loadconfig(&config);
    }

    // Scores of n keys and 16 rows of the query, without units where the keys have one band.
    void score(int row, int n) {
        const uint32_t* query = query_ + row * (size_ / 2);
        const int depth = size_ / key_.bands;
        for (int band = 0; band < key_.bands; ++band)
            for (int i = 0; i < n; i += 2 * TILE) {
                float* out = columns_ + (band * BATCH + i) * TILE;
                _tile_zero(0);
                _tile_zero(1);
                for (int d = band * depth; d < (band + 1) * depth; d += PAIRS_DEPTH) {
                    _tile_loadd(3, query + d / 2 * TILE, 64);
                    _tile_loadd(2, key_.rows + i * size_ + d, size_ * 2);
                    _tile_dpbf16ps(0, 2, 3);
                    _tile_loadd(2, key_.rows + (i + TILE) * size_ + d, size_ * 2);
                    _tile_dpbf16ps(1, 2, 3);
                }
                _tile_stored(0, out, 64);
                _tile_stored(1, out + TILE * TILE, 64);
            }
        for (int i = 0; i < n; i += TILE)
            for (int first = 0; first < TILE && row + first < rows_; first += 4) {
                F x[4];
                transpose4(columns_ + i * TILE + first, x);
                if (key_.bands == 2) {
                    F y[4];
                    transpose4(columns_ + (BATCH + i) * TILE + first, y);
                    const F units = load(key_.units[0] + i), others = load(key_.units[1] + i);
                    for (int j = 0; j < 4; ++j) x[j] = x[j] * units + y[j] * others;
                }
                for (int j = 0; j < 4; ++j) store(scores_ + (row + first + j) * BATCH + i, x[j]);
            }
    }

    // 4 columns of a 16 x 16 block of floats.
    static void transpose4(const float* block, F (&out)[4]) {
        F x[4];
        for (int i = 0; i < 4; ++i) {
            x[i] = _mm512_castps128_ps512(_mm_loadu_ps(block + i * TILE));
            x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, _mm_loadu_ps(block + (i + 4) * TILE));
            x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, _mm_loadu_ps(block + (i + 8) * TILE));
            x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, _mm_loadu_ps(block + (i + 12) * TILE));
        }
        const F low = _mm512_unpacklo_ps(x[0], x[1]), high = _mm512_unpackhi_ps(x[0], x[1]);
        const F low2 = _mm512_unpacklo_ps(x[2], x[3]), high2 = _mm512_unpackhi_ps(x[2], x[3]);
        // Lane j of x[i] was key 4 j + i.
        out[0] = _mm512_shuffle_ps(low, low2, 0x44);
        out[1] = _mm512_shuffle_ps(low, low2, 0xee);
        out[2] = _mm512_shuffle_ps(high, high2, 0x44);
        out[3] = _mm512_shuffle_ps(high, high2, 0xee);
    }

    // Scores to weights in two parts; those past the n keys are 0.
    template <class Seen>
    void weigh(int n, Seen visible) {
        const float soft_cap = plan_.call.soft_cap * LOG2_E;
        const uint64_t keys = n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
        for (int query = 0, row = 0; query < queries_; ++query) {
            const Visible seen = visible(query);
            for (int head = 0; head < plan_.group; ++head, ++row) {
                float* scores = scores_ + row * BATCH;
                result.weigh(scores, row, seen, n, size_, key_units_, value_.units[0], soft_cap);
                for (int i = 0; i < BATCH; i += 2 * LANES) {
                    const F low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keys >> i), scores + i);
                    const F high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(keys >> (i + LANES)), scores + i + LANES);
                    const __m512i main = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                    const __m512i rest = (__m512i)_mm512_cvtne2ps_pbh(
                        high - widen(_mm512_extracti64x4_epi64(main, 1)), low - widen(_mm512_castsi512_si256(main)));
                    _mm512_storeu_si512(weights_[0] + row * BATCH + i, main);
                    _mm512_storeu_si512(weights_[1] + row * BATCH + i, rest);
                }
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

    // Adds the weighted values to 16 rows of the result.
    void add_values(int row, int n) {
        for (int d = 0; d < size_; d += 2 * TILE) {
            float* out = result.weighted + row * size_ + d;
            _tile_loadd(4, out, size_ * 4);
            _tile_loadd(5, out + TILE, size_ * 4);
            for (int i = 0; i < n; i += PAIRS_DEPTH) {
                const uint32_t* pairs = pairs_ + i / 2 * size_ + d;
                _tile_loadd(6, weights_[0] + row * BATCH + i, BATCH * 2);
                _tile_loadd(7, weights_[1] + row * BATCH + i, BATCH * 2);
                _tile_loadd(3, pairs, size_ * 4);
                _tile_dpbf16ps(4, 6, 3);
                _tile_dpbf16ps(4, 7, 3);
                _tile_loadd(3, pairs + TILE, size_ * 4);
                _tile_dpbf16ps(5, 6, 3);
                _tile_dpbf16ps(5, 7, 3);
            }
            _tile_stored(4, out, size_ * 4);
            _tile_stored(5, out + TILE, size_ * 4);
        }
    }

    const Plan& plan_;
    const Layout& layout_;
    const int size_;
    int queries_ = 0, rows_ = 0;
    uint32_t* query_ = nullptr;  // for each 16 rows, (head_size / 2) pairs of elements by 16
    float *scores_ = nullptr, *columns_ = nullptr, *key_units_ = nullptr;
    uint16_t* weights_[2] = {nullptr, nullptr};
    uint32_t* pairs_ = nullptr;  // of values, (BATCH / 2 x head_size)
    Halves key_, value_;
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
