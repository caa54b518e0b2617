// Folds batches of keys and values into the results of a unit, in float32: rows.h where few query
// rows share a key (decode), matrix.h where many do.
#pragma once

#include "batch.h"
#include "codes.h"
#include "matrix.h"
#include "plan.h"
#include "softmax.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int MATRIX_ROWS = 17;  // from this many rows of a unit on, a dense tile pays

// What keys and values are: vectors of pages, or rows of int8, or of the model dtype.
enum class Source { PAGES, CODES, ROWS };

class Fold {
  public:
    static constexpr int BATCH = sparsekv::SPARSEKV_ISA::BATCH;

    explicit Fold(const Plan& plan) : plan_(plan), layout_(plan.call.layout), size_(layout_.head_size) {}

    static int capacity(Source) { return BATCH; }

    // Whether the two cannot be in one batch.
    static bool differ(Source a, Source b) { return (a == Source::PAGES) != (b == Source::PAGES); }

    void carve(Carver& carver) {
        query_ = carver.take<float>(plan_.rows * size_);
        code_query_ = carver.take<float>(plan_.rows * code_query_size(size_));
        result = Accumulator(carver.take<float>(Accumulator::floats(plan_.rows, size_)), plan_.rows);
        scores_ = carver.take<float>(plan_.rows * BATCH);
        key_.carve(carver, size_, layout_.storage, layout_.key);
        value_.carve(carver, size_, layout_.storage, layout_.value);
        if (plan_.rows >= MATRIX_ROWS) {
            dense_ = carver.take<float>(BATCH * size_);
            transposed_ = carver.take<float>(BATCH * size_);
        }
    }

    // Once the memory is there.
    void initialize() {
        key_.initialize();
        value_.initialize();
    }

    // The rows of a unit, `group` each of its queries; query(i) is where those of one begin.
    template <class Query>
    void begin(int queries, Query query) {
        decode_queries(queries, query);
        if (key_.storage(false) != INT4 + WHOLE || rows_ >= MATRIX_ROWS) return;
        for (int row = 0; row < rows_; row += ROW_BLOCK)
            order_queries(query_ + row * size_, block_rows(row), size_, code_query_ + row * code_query_size(size_));
    }

    void end() {}

    // Appends `count` entries of a tile, from `first` on, as number n and following. With `in_place`
    // they are all of the batch, and memory is readable past the tile.
    void add_run(const Tile<const uint8_t>& tile, int first, int count, int n, bool in_place, Ahead&) {
        key_.add_run(tile.key, first, count, n, in_place);
        value_.add_run(tile.value, first, count, n, in_place);
    }

    // Appends rows of the model dtype as number n.
    void add_row(const uint8_t* key, const uint8_t* value, int n) {
        key_.add_row(key, n);
        value_.add_row(value, n);
    }

    // Appends rows of int8 as number n, and what they count in.
    void add_codes(const int8_t* key, const int8_t* value, float key_step, float value_step, int n) {
        key_.add_codes(key, key_step, n);
        value_.add_codes(value, value_step, n);
    }

    // Folds the n vectors of the batch, dense rows or vectors of pages, and empties it; visible(i) is
    // what the i-th query sees of it.
    template <class Seen>
    void fold(int n, Source source, Seen visible, Ahead& ahead) {
        const bool dense = source != Source::PAGES;
        const Vectors key = key_.vectors(dense, n), value = value_.vectors(dense, n);
        const int key_storage = key_.storage(dense), value_storage = value_.storage(dense);
        if (rows_ < MATRIX_ROWS) {
            score(key_storage, key, n, ahead);
            weigh(key, value, n, visible);
            for (int row = 0; row < rows_; row += ROW_BLOCK)
                weigh_kernel(value_storage, block_rows(row))(
                    scores_ + row * BATCH, value, n, size_, result.weighted + row * size_, ahead);
        } else {
            ahead.fetch(2 * n);
            const int columns = round_up(n, LANES);
            transpose_rows(dense_rows(key_storage, key, n), columns, size_, transposed_);
            product(query_, size_, transposed_, BATCH, scores_, BATCH, rows_, size_, columns, false);
            weigh(key, value, n, visible);
            product(scores_, BATCH, dense_rows(value_storage, value, n), size_, result.weighted, size_, rows_, n,
                    size_, true);
        }
        key_.begin();
        value_.begin();
    }

    Accumulator result{nullptr, 0};

  protected:
    template <class Query>
    void decode_queries(int queries, Query query) {
        const int width = plan_.group * size_;
        queries_ = queries;
        rows_ = queries * plan_.group;
        result.clear(rows_, size_);
        const float scale = plan_.call.scale * LOG2_E;
        for (int i = 0; i < queries; ++i) {
            decode_row(layout_.storage, query(i), width, query_ + i * width);
            for (int j = 0; j < width; ++j) query_[i * width + j] *= scale;
        }
    }

    const Plan& plan_;
    const Layout& layout_;
    const int size_;
    int queries_ = 0, rows_ = 0;
    float* query_ = nullptr;  // (rows x head_size), for scores in base 2

  private:
    int block_rows(int row) const { return rows_ - row < ROW_BLOCK ? rows_ - row : ROW_BLOCK; }

    void score(int storage, const Vectors& key, int n, Ahead& ahead) {
        for (int row = 0; row < rows_; row += ROW_BLOCK) {
            float* scores = scores_ + row * BATCH;
            if (storage == INT4 + WHOLE)
                code_kernel(block_rows(row))(code_query_ + row * code_query_size(size_), key, n, size_, scores, ahead);
            else score_kernel(storage, block_rows(row))(query_ + row * size_, key, n, size_, scores, ahead);
        }
    }

    const float* dense_rows(int storage, const Vectors& vectors, int n) const {
        if (storage == DENSE) return reinterpret_cast<const float*>(vectors.values);
        expand_rows(storage, vectors, n, size_, dense_);
        return dense_;
    }

    template <class Seen>
    void weigh(const Vectors& key, const Vectors& value, int n, Seen visible) {
        const float soft_cap = plan_.call.soft_cap * LOG2_E;
        for (int query = 0, row = 0; query < queries_; ++query) {
            const Visible seen = visible(query);
            for (int head = 0; head < plan_.group; ++head, ++row)
                result.weigh(scores_ + row * BATCH, row, seen, n, size_, key.units, value.units, soft_cap);
        }
    }

    float *code_query_ = nullptr, *scores_ = nullptr;
    float *dense_ = nullptr, *transposed_ = nullptr;
    Batch key_, value_;
};

}  // namespace sparsekv::SPARSEKV_ISA
