// As fold.h, for few query rows and whole integer keys and values, by products of bytes.
//
// Each row of the query, and the weights of each row, are sums of DIGITS rows of bytes that count in powers
// of 256: the largest number of a row takes all 24 bits. Products are sums of integers, so nothing else is
// lost; what the zeros of codes are worth is one number a key. Rows of the step itself are left to fold.h.
#pragma once

#include "byte_products.h"
#include "fold.h"

#if defined(__AVX512VNNI__)

namespace sparsekv::SPARSEKV_ISA {

class ByteFold : public Fold {
  public:
    static constexpr int BATCH = BYTE_BATCH;

    static bool serves(const Plan& plan) {
        const Layout& layout = plan.call.layout;
        const auto whole = [&](const VectorLayout& x) {
            return is_integer(x.storage) && x.survivors == layout.head_size;
        };
        return plan.rows < MATRIX_ROWS && whole(layout.key) && whole(layout.value);
    }

    explicit ByteFold(const Plan& plan) : Fold(plan) {}

    static int capacity(Source source) { return source == Source::ROWS ? Fold::BATCH : BATCH; }
    static bool differ(Source a, Source b) { return (a == Source::ROWS) != (b == Source::ROWS); }

    void carve(Carver& carver) {
        Fold::carve(carver);
        keys_.carve(carver, size_, layout_.key, KEY_ORDER);
        values_.carve(carver, size_, layout_.value, NATURAL_ORDER);
        stride_ = keys_.row_stride();
        lefts_ = keys_.bands * round_up(plan_.rows * DIGITS, TILE);
        digits_ = carver.take<int8_t>(lefts_ * stride_);
        digit_sums_ = carver.take<int32_t>(lefts_);
        query_units_ = carver.take<float>(plan_.rows);
        query_sums_ = carver.take<float>(plan_.rows * keys_.bands);
        right_keys_ = carver.take<uint32_t>(BATCH * stride_ / 4);
        right_values_ = carver.take<uint32_t>(BATCH * stride_ / 4);
        products_ = carver.take<int32_t>(lefts_ * BATCH);
        weights_ = carver.take<float>(plan_.rows * BATCH);
        weight_digits_ = carver.take<int8_t>(lefts_ * BATCH);
        weight_units_ = carver.take<float>(plan_.rows);
        zeros_worth_ = carver.take<float>(plan_.rows);
        ones_ = carver.take<float>(BATCH);
    }

    void initialize() {
        Fold::initialize();
        for (int i = 0; i < BATCH; ++i) ones_[i] = 1;
    }

    template <class Query>
    void begin(int queries, Query query) {
        decode_queries(queries, query);
        for (int row = 0; row < rows_; ++row) split_query(row);
        ByteProducts::begin(rows_ * DIGITS);
    }

    void end() { ByteProducts::end(); }

    void add_run(const Tile<const uint8_t>& tile, int first, int count, int n, bool, Ahead& ahead) {
        ahead.fetch(2 * count);
        keys_.add_run(tile.key, first, count, n);
        values_.add_run(tile.value, first, count, n);
    }

    void add_codes(const int8_t* key, const int8_t* value, float key_step, float value_step, int n) {
        keys_.add_row(key, key_step, n);
        values_.add_row(value, value_step, n);
    }

    template <class Seen>
    void fold(int n, Source source, Seen visible, Ahead& ahead) {
        if (source == Source::ROWS) return Fold::fold(n, source, visible, ahead);
        const int columns = round_up(n, BYTE_COLUMNS);
        for (int i = n; i < columns; ++i) values_.units[0][i] = values_.zeros[0][i] = 0;
        order_factors(columns);
        for (int i = 0; i < columns; i += BYTE_COLUMNS) multiply_keys(right_keys_ + i * stride_ / 4, products_ + i * lefts_);
        for (int i = 0; i < columns; i += BYTE_COLUMNS)
            for (int row = 0; row < rows_; ++row) score(row, i, keys_.has_rows() ? 128 : 0);
        const float soft_cap = plan_.call.soft_cap * LOG2_E;
        for (int query = 0, row = 0; query < queries_; ++query) {
            const Visible seen = visible(query);
            for (int head = 0; head < plan_.group; ++head, ++row) {
                result.weigh(weights_ + row * BATCH, row, seen, n, size_, ones_, values_.units[0], soft_cap);
                split_weights(row, n, columns);
            }
        }
        for (int d = 0; d < size_; d += BYTE_COLUMNS) {
            ByteProducts::multiply<Signed::RIGHT>(weight_digits_, BATCH, rows_ * DIGITS, right_values_ + d * BATCH / 4,
                                                  columns, products_);
            for (int row = 0; row < rows_; ++row) add_products(row, d);
        }
        keys_.begin();
        values_.begin();
    }

  private:
    static constexpr int DIGITS = 3;
    static constexpr int VECTORS = BYTE_COLUMNS / LANES;

    static F magnitudes(F x) { return bits_to_float(float_to_bits(x) & INT32_MAX); }

    // What makes the largest number of a row `most`; 0 where that is next to nothing.
    static float factor_of(float largest, float most) { return largest > 0x1p-100f ? most / largest : 0.f; }

    // The row of a left factor where the digits of a row of the query begin.
    int left_of(int row, int band) const { return (band * rows_ + row) * DIGITS; }

    // The digits of a row, the most significant first, band by band, in KEY_ORDER.
    void split_query(int row) {
        constexpr float MOST = 0x7f7f00;
        const float* query = query_ + row * size_;
        const int bands = keys_.bands, band_size = size_ / bands;
        const __m512i lanes = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)KEY_ORDER.places));
        F greatest{};
        for (int d = 0; d < size_; d += LANES) greatest = max(magnitudes(load(query + d)), greatest);
        const float most = largest(greatest), factor = factor_of(most, MOST);
        query_units_[row] = most / MOST;
        for (int band = 0; band < bands; ++band) {
            const int left = left_of(row, band), last = (band + 1) * band_size;
            int8_t* digits = digits_ + left * stride_;
            memset(digits, 0, DIGITS * stride_);
            F total{};
            I sums[DIGITS] = {};
            for (int d = band * band_size; d < last; d += LANES) {
                const F elements = load_first(query + d, last - d);
                total += elements;
                I number = (I)_mm512_cvtps_epi32(elements * factor) + 0x808080;
                number = (I)_mm512_permutexvar_epi32(lanes, (__m512i)number);
                for (int digit = DIGITS; digit-- > 0; number >>= 8) {
                    const I byte = (number & 255) - 128;
                    sums[digit] += byte;
                    _mm_storeu_si128((__m128i*)(digits + digit * stride_ + d), _mm512_cvtepi32_epi8((__m512i)byte));
                }
            }
            query_sums_[row * bands + band] = sum(total);
            for (int digit = 0; digit < DIGITS; ++digit)
                digit_sums_[left + digit] = _mm512_reduce_add_epi32((__m512i)sums[digit]);
        }
    }

    // All of both at once: tiles that are loaded right after they are stored have to wait.
    void order_factors(int columns) {
        for (int i = 0; i < columns; i += BYTE_COLUMNS) keys_.turn(i, right_keys_ + i * stride_ / 4);
        for (int d = 0; d < stride_; d += BYTE_COLUMNS) values_.pack(d, columns, right_values_ + d * BATCH / 4);
    }

    // Of 64 keys: band by band, over its elements alone where that many can be multiplied.
    void multiply_keys(const uint32_t* right, int32_t* out) const {
        const int band_size = size_ / keys_.bands;
        const bool alone = keys_.bands == 2 && band_size % ByteProducts::DEPTH == 0;
        for (int band = 0; band < keys_.bands; ++band) {
            const int left = left_of(0, band), first = alone ? band * band_size : 0, depth = alone ? band_size : stride_;
            ByteProducts::multiply<Signed::LEFT>(digits_ + left * stride_ + first, stride_, rows_ * DIGITS,
                                                 right + first / 4 * BYTE_COLUMNS, depth, out + left * BYTE_COLUMNS);
        }
    }

    // What the products of a row's digits are worth together, less what counts too much.
    static F worth(const int32_t* products, const I (&more)[DIGITS]) {
        F parts[DIGITS];
#pragma GCC unroll 3
        for (int digit = 0; digit < DIGITS; ++digit) {
            I product;
            memcpy(&product, products + digit * BYTE_COLUMNS, sizeof product);
            parts[digit] = __builtin_convertvector(product - more[digit], F);
        }
        return parts[0] * 65536.f + (parts[1] * 256.f + parts[2]);
    }

    // Of 64 keys, from number `first` on, whose bytes count `middle` too much.
    void score(int row, int first, int middle) {
        F scores[VECTORS] = {};
        for (int band = 0; band < keys_.bands; ++band) {
            const int left = left_of(row, band);
            const float unit = query_units_[row], sum = query_sums_[row * keys_.bands + band];
            I more[DIGITS];
            for (int digit = 0; digit < DIGITS; ++digit) more[digit] = I{} + middle * digit_sums_[left + digit];
            const int32_t* products = products_ + first * lefts_ + left * BYTE_COLUMNS;
            const float *zeros = keys_.zeros[band] + first, *units = keys_.units[band] + first;
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i) {
                const F dot = worth(products + LANES * i, more) * unit;
                scores[i] += load(units + LANES * i) * (dot - load(zeros + LANES * i) * sum);
            }
        }
        for (int i = 0; i < VECTORS; ++i) store(weights_ + row * BATCH + first + LANES * i, scores[i]);
    }

    // The digits of a row's n weights, in the order of packed values; 0 up to `columns`.
    void split_weights(int row, int n, int columns) {
        constexpr float MOST = 0xffff00;
        float* weights = weights_ + row * BATCH;
        const float* zeros = values_.zeros[0];
        for (int i = round_up(n, LANES); i < columns; i += LANES) store(weights + i, F{});
        F greatest{}, worth{};
        for (int i = 0; i < columns; i += LANES) {
            const F weight = load(weights + i);
            greatest = max(weight, greatest);
            worth += weight * load(zeros + i);
        }
        const float most = largest(greatest), factor = factor_of(most, MOST);
        weight_units_[row] = most / MOST;
        zeros_worth_[row] = sum(worth);
        // Of every four numbers their digits, four by four.
        const __m512i digits =
            _mm512_broadcast_i32x4(_mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15));
        int8_t* out = weight_digits_ + row * DIGITS * BATCH;
        for (int i = 0; i < columns; i += BYTE_COLUMNS, out += BYTE_COLUMNS) {
            __m512i a[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                a[j] = _mm512_shuffle_epi8(_mm512_cvtps_epi32(load(weights + i + LANES * j) * factor), digits);
            turn4(a);
            for (int digit = 0; digit < DIGITS; ++digit) _mm512_store_si512(out + digit * BATCH, a[digit]);
        }
    }

    // What products of 64 elements, from d on, are worth to a row.
    void add_products(int row, int d) {
        const int32_t* products = products_ + row * DIGITS * BYTE_COLUMNS;
        const I none[DIGITS] = {};
        F a[4];
        for (int i = 0; i < 4; ++i) a[i] = worth(products + LANES * i, none) * weight_units_[row] - zeros_worth_[row];
        // From the order of packed values' columns.
        const F low = _mm512_shuffle_f32x4(a[0], a[1], 0x44), high = _mm512_shuffle_f32x4(a[0], a[1], 0xee);
        const F low2 = _mm512_shuffle_f32x4(a[2], a[3], 0x44), high2 = _mm512_shuffle_f32x4(a[2], a[3], 0xee);
        a[0] = _mm512_shuffle_f32x4(low, low2, 0x88);
        a[1] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        a[2] = _mm512_shuffle_f32x4(high, high2, 0x88);
        a[3] = _mm512_shuffle_f32x4(high, high2, 0xdd);
        float* sums = result.weighted + row * size_ + d;
        for (int i = 0; i < 4 && d + LANES * i < size_; ++i) store(sums + LANES * i, load(sums + LANES * i) + a[i]);
    }

    ByteVectors keys_, values_;
    int stride_ = 0;                 // elements of a row of bytes
    int lefts_ = 0;                  // rows of a left factor at most
    int8_t* digits_ = nullptr;       // (bands x rows x DIGITS x stride)
    int32_t* digit_sums_ = nullptr;  // (bands x rows x DIGITS)
    float* query_units_ = nullptr;   // of each row
    float* query_sums_ = nullptr;    // (rows x bands)
    uint32_t *right_keys_ = nullptr, *right_values_ = nullptr;
    int32_t* products_ = nullptr;
    float* weights_ = nullptr;        // (rows x BATCH), scores at first
    int8_t* weight_digits_ = nullptr;  // (rows x DIGITS x BATCH)
    float *weight_units_ = nullptr, *zeros_worth_ = nullptr;  // of each row
    float* ones_ = nullptr;
};

}  // namespace sparsekv::SPARSEKV_ISA

#endif
