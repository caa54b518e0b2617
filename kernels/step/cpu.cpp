// One layer's step in one parallel region: vectors change basis and are packed, the step attends, and
// its newest tokens enter the ring. reference.py says what it computes.

#include <omp.h>

#include "../pack/pack.h"
#include "../window/window.h"
#include "change.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int CHANGE_ROWS = PACK_ROWS;  // rows that share the loads of a matrix

// Mirrors calls.StepCall.
struct StepCall {
    AttentionCall attention;  // query, key and value of the model; the key is nullptr where `kept` are read
    Change key_change, query_change, value_change;
    Feedback key_feedback, value_feedback;
    const StepBatch* batch;  // for attention.batch, which is empty
    uint8_t *kept_key, *kept_value;  // (num_tokens, num_kv_heads, head_size), or nullptr: of nobody else
    int32_t fills_window;
};

class Step {
  public:
    explicit Step(const StepCall& step)
        : step_(step), call_(step.attention), layout_(call_.layout), size_(layout_.head_size),
          given_(call_), gives_(call_.key && !step.kept_key) {
        thread_local Scratch memory;
        call_.batch = *step.batch;
        const bool writes = call_.key;
        const int group = call_.num_heads / call_.num_kv_heads;
        tokens_ = call_.batch.query_start_loc[call_.batch.num_reqs];
        const int heads = call_.num_heads + 2 * call_.num_kv_heads;
        Carver carver(memory.reserve(tokens_ * (heads * layout_.row_bytes() + sizeof(int32_t)) + 4 * 64));
        key_ = place(carver, call_.key, call_.key_stride, step.key_change, step.kept_key, 1);
        value_ = place(carver, call_.value, call_.value_stride, step.value_change, step.kept_value, 1);
        query_ = place(carver, call_.query, call_.query_stride, step.query_change, nullptr, group);
        query_tokens_ = group < CHANGE_ROWS ? CHANGE_ROWS / group : 1;
        if (query_.stored) list_asking(carver.take<int32_t>(tokens_));
        query_blocks_ = blocks(asking_, query_tokens_);
        key_blocks_ = writes ? blocks(tokens_, CHANGE_ROWS) : 0;
    }

    // See Plan.
    const StepVectors* given() const { return gives_ ? &given_ : nullptr; }

    const AttentionCall& attention() const { return call_; }

    // Blocks of tokens of one KV head: queries first, they are the most.
    int64_t pieces() const { return call_.num_kv_heads * (query_blocks_ + 2 * key_blocks_); }

    // Asks for the matrices of a piece.
    void expect(int64_t piece) const {
        if (piece >= pieces()) return;
        const int head = static_cast<int>(piece % call_.num_kv_heads);
        const int64_t block = piece / call_.num_kv_heads - query_blocks_;
        if (block < 0) return expect(*query_.change, head);
        const bool key = block % 2 == 0;
        expect(*(key ? key_ : value_).change, head);
        const Feedback& feedback = key ? step_.key_feedback : step_.value_feedback;
        if (feedback.matrix) prefetch(feedback.matrix + head * feedback.stride, matrix_bytes());
    }

    // Asks for the matrices of the output.
    void expect_output() const {
        for (int head = 0; head < call_.num_kv_heads; ++head) expect(call_.out_change, head);
    }

    void prepare(int64_t piece) {
        expect(piece + call_.num_threads);
        const int head = static_cast<int>(piece % call_.num_kv_heads);
        const int64_t block = piece / call_.num_kv_heads;
        if (block < query_blocks_) {
            const int64_t first = block * query_tokens_;
            const int count = static_cast<int>(last(first, query_tokens_, asking_) - first);
            return change(query_, head, count, [&](int i) { return int64_t(asking_tokens_[first + i]); });
        }
        const int64_t first = (block - query_blocks_) / 2 * CHANGE_ROWS;
        const int count = static_cast<int>(last(first, CHANGE_ROWS, tokens_) - first);
        const auto token = [&](int i) { return first + i; };
        if ((block - query_blocks_) % 2 == 0) {
            change(key_, head, count, token);
            pack(call_.key, call_.key_stride, layout_.key, &Tile<uint8_t>::key, step_.key_feedback, head,
                 first, count);
        } else {
            change(value_, head, count, token);
            pack(call_.value, call_.value_stride, layout_.value, &Tile<uint8_t>::value,
                 step_.value_feedback, head, first, count);
        }
    }

    WindowCall window() const {
        return {call_.key, call_.value, const_cast<uint8_t*>(call_.window), call_.key_stride, call_.value_stride,
                call_.window_stride, call_.window_head_stride, call_.num_kv_heads, call_.slots_per_block,
                call_.num_threads, layout_, call_.batch};
    }

  private:
    // Rows of the model and, where `stored` is not nullptr, where they go in the basis.
    struct Rows {
        const Change* change;
        const uint8_t* given;
        uint8_t* stored;  // (num_tokens, heads, head_size)
        int64_t stride;   // elements from token to token of those given
        int group;        // heads per KV head
    };

    // Sets where attention finds the rows.
    Rows place(Carver& carver, const uint8_t*& rows, int64_t& stride, const Change& change, uint8_t* kept, int group) {
        Rows result{&change, rows, kept, stride, group};
        if (!kept && change.matrix)
            result.stored = carver.take<uint8_t>(tokens_ * call_.num_kv_heads * group * layout_.row_bytes());
        if (result.stored) {
            rows = result.stored;
            stride = int64_t(call_.num_kv_heads) * group * size_;
        }
        return result;
    }

    void expect(const Change& change, int head) const {
        if (change.matrix) prefetch(change.matrix + head * change.matrix_stride, matrix_bytes());
    }

    int64_t matrix_bytes() const { return int64_t(size_) * size_ * sizeof(Float16); }

    static int64_t blocks(int64_t tokens, int each) { return (tokens + each - 1) / each; }

    static int64_t last(int64_t first, int count, int64_t end) { return first + count < end ? first + count : end; }

    // The tokens whose queries attend in the basis.
    void list_asking(int32_t* tokens) {
        asking_tokens_ = tokens;
        const StepBatch& batch = call_.batch;
        for (int i = 0; i < batch.num_reqs; ++i) {
            const int32_t begin = batch.query_start_loc[i], end = batch.query_start_loc[i + 1];
            if (gives_ && batch.seq_lens[i] == end - begin) continue;
            for (int32_t token = begin; token < end; ++token) tokens[asking_++] = token;
        }
    }

    // `count` tokens of one KV head, the i-th of which is token(i).
    template <class Token>
    void change(const Rows& rows, int head, int count, Token token) const {
        thread_local Scratch memory;
        if (!rows.stored) return;
        const int width = rows.group * size_, bytes = rows.group * layout_.row_bytes();
        Carver carver(memory.reserve(2 * (size_t(count) * width * sizeof(float) + 64)));
        float *before = carver.take<float>(count * width), *after = carver.take<float>(count * width);
        const auto given = [&](int64_t token) {
            return rows.given + (token * rows.stride + head * width) * layout_.element_bytes();
        };
        const auto stored = [&](int64_t token) { return rows.stored + (token * call_.num_kv_heads + head) * bytes; };
        if (!rows.change->matrix) {
            for (int i = 0; i < count; ++i) memcpy(stored(token(i)), given(token(i)), bytes);
            return;
        }
        for (int i = 0; i < count; ++i) decode_row(layout_.storage, given(token(i)), width, before + i * width);
        change_rows(*rows.change, head, before, count * rows.group, size_, after);
        for (int i = 0; i < count; ++i) encode_row(layout_.storage, after + i * width, width, stored(token(i)));
    }

    void pack(const uint8_t* rows, int64_t stride, const VectorLayout& vector,
              Section<uint8_t> Tile<uint8_t>::*section, const Feedback& feedback, int head, int64_t first,
              int count) const {
        const int64_t element = first * stride + int64_t(head) * size_;
        uint8_t* pages = const_cast<uint8_t*>(call_.pages) + head * call_.page_head_stride;
        pack_rows({rows + element * layout_.element_bytes(), stride, call_.batch.slot_mapping + first, pages,
                   call_.page_stride, call_.block_size},
                  static_cast<int>(last(first, count, call_.batch.num_slots) - first), layout_, vector, section, feedback,
                  head);
    }

    const StepCall& step_;
    AttentionCall call_;
    const Layout& layout_;
    const int size_;
    const StepVectors given_;
    const bool gives_;
    int query_tokens_;
    int64_t tokens_, key_blocks_, query_blocks_, asking_ = 0;
    int32_t* asking_tokens_ = nullptr;
    Rows key_, value_, query_;
};

SPARSEKV_EXPORT(step)(const StepCall* call) {
    Step step(*call);
    const Plan plan(step.attention(), step.given());
    const WindowCall window = step.window();
#pragma omp parallel num_threads(window.num_threads)
    {
        const int thread = omp_get_thread_num();
        step.expect(thread);
        expect(plan, thread);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t piece = 0; piece < step.pieces(); ++piece) step.prepare(piece);
        step.expect_output();
#pragma omp barrier
        attend(plan);
        if (call->fills_window) {
#pragma omp for schedule(dynamic, 1)
            for (int request = 0; request < window.batch.num_reqs; ++request) write_request(window, request);
        }
    }
}

}  // namespace sparsekv::SPARSEKV_ISA
