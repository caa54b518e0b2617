// Paged attention over sparse pages; reference.py says what it computes.
//
// Each unit of the plan collects its keys and values in batches and folds them into an online softmax:
// byte_fold.h in integers and pairs.h in bfloat16, where the processor multiplies those, or fold.h in float32.

#include "../step/change.h"
#include "byte_fold.h"
#include "fold.h"
#include "ring.h"
#include "pairs.h"

namespace sparsekv::SPARSEKV_ISA {

// `Folding` is one of the classes named above.
template <class Folding>
class Worker {
    static constexpr int BATCH = Folding::BATCH;

  public:
    explicit Worker(const Plan& plan)
        : plan_(plan), call_(plan.call), layout_(call_.layout), size_(layout_.head_size), folding_(plan),
          in_basis_(call_) {
        Carver count(nullptr);
        carve(count);
        Carver carver(memory().reserve(count.used()));
        carve(carver);
        folding_.initialize();
    }

    // Attends one unit; a request in parts leaves its result in the plan's partials.
    void attend(int64_t number) {
        begin(number);
        const Request& request = *unit_.request;
        sparsekv::SPARSEKV_ISA::expect(plan_, number + call_.num_threads);
        ring_.find(call_, unit_, first_seen_);
        if (unit_.part == 0) add_sinks();
        const Blocks blocks = plan_.blocks(unit_);
        add_pages(blocks.first, blocks.last);
        if (unit_.part + 1 == request.parts) {
            add_window();
            add_step();
        }
        fold();
        folding_.end();
        if (request.parts == 1) return write();
        const Accumulator partial = partial_result(unit_.partial);
        memcpy(partial.maximum, folding_.result.maximum, sizeof(float) * rows_);
        memcpy(partial.total, folding_.result.total, sizeof(float) * rows_);
        memcpy(partial.weighted, folding_.result.weighted, sizeof(float) * rows_ * size_);
    }

    // Combines the parts of the tile whose first part is this unit.
    void merge(int64_t number) {
        const Unit unit = plan_.unit(number);
        if (unit.request->parts == 1 || unit.part) return;
        begin(number);
        for (int part = 0; part < unit.request->parts; ++part)
            for (int row = 0; row < rows_; ++row)
                folding_.result.merge(partial_result(unit.partial + part), row, size_);
        folding_.end();
        write();
    }

  private:
    static Scratch& memory() {
        thread_local Scratch scratch;
        return scratch;
    }

    void carve(Carver& carver) {
        folding_.carve(carver);
        if (call_.out_change.matrix) changed_ = carver.take<float>(plan_.rows * size_);
        ring_.carve(carver, layout_);
    }

    Accumulator partial_result(int64_t index) const {
        return Accumulator(plan_.partial_results + index * Accumulator::floats(plan_.rows, size_), plan_.rows);
    }

    void begin(int64_t number) {
        unit_ = plan_.unit(number);
        rows_ = unit_.queries * plan_.group;
        first_token_ = call_.batch.query_start_loc[unit_.index];
        first_seen_ = plan_.first_seen(*unit_.request, unit_.first_query);
        step_begin_ = INT32_MAX / 2;
        step_ = plan_.given && unit_.request->context == 0 ? plan_.given : &in_basis_;
        folding_.begin(unit_.queries, [&](int i) { return query_heads(step_->query, step_->query_stride, i); });
    }

    // The unit's heads of its i-th query, in `query` or `out`.
    template <class Byte>
    Byte* query_heads(Byte* base, int64_t stride, int i) const {
        const int64_t token = first_token_ + unit_.first_query + i;
        return base + (token * stride + unit_.head * plan_.group * size_) * layout_.element_bytes();
    }

    // The pruned history that is seen in blocks [first, last), without what the ring holds.
    void add_pages(int64_t first, int64_t last) {
        const int context = unit_.request->context, block_size = call_.block_size;
        const int32_t* table = call_.batch.pages(unit_.index);
        turn_to(Source::PAGES);
        for (int64_t block = first; block < last; ++block) {
            const Tile<const uint8_t> tile(plan_.tile(unit_, block), block_size, layout_);
            if (block + 1 < last) expect(plan_.tile(unit_, block + 1));
            const int start = static_cast<int>(block) * block_size;
            const int end = start + block_size < context ? start + block_size : context;
            for (int i = start > first_seen_ ? start : first_seen_; i < end;) {
                int stop = i;
                if (end + layout_.window <= context) stop = end;
                while (stop < end && !ring_.at(stop)) ++stop;
                while (i < stop) {
                    const int room = Folding::capacity(Source::PAGES) - batch_, take = stop - i < room ? stop - i : room;
                    const bool in_place = take == BATCH && table[block] + 1 < call_.num_blocks;
                    folding_.add_run(tile, i - start, take, batch_, in_place, ahead_);
                    for (int j = 0; j < take; ++j) positions_[batch_ + j] = i + j;
                    batch_ += take;
                    i += take;
                    if (take == room) fold();
                }
                while (i < end && ring_.at(i)) ++i;
            }
            if (start < first_seen_) fold();  // so that whole blocks follow, read in place
        }
    }

    void expect(const uint8_t* tile) {
        ahead_.next = tile;
        ahead_.end = tile + call_.block_size * layout_.token_bytes();
        ahead_.piece = layout_.token_bytes() + 8;
    }

    void add_sinks() {
        if (!call_.sinks) return;
        const float* sinks = call_.sinks + unit_.head * plan_.group;
        for (int row = 0; row < rows_; ++row) folding_.result.add_sink(row, sinks[row % plan_.group] * LOG2_E);
    }

    void add_window() {
        turn_to(layout_.window_bytes == 1 ? Source::CODES : Source::ROWS);
        if (batch_ && positions_[batch_ - 1] > ring_.first()) fold();  // visible() counts on their order
        for (int i = ring_.first(); i < unit_.request->context; ++i)
            if (const uint8_t* slot = ring_.at(i)) add_slot(slot, i);
    }

    void add_step() {
        turn_to(Source::ROWS);
        const int context = unit_.request->context, last = unit_.first_query + unit_.queries;
        const int first = first_seen_ > context ? first_seen_ - context : 0;
        step_begin_ = batch_ - first;
        for (int i = first; i < last; ++i) {
            const int64_t token = first_token_ + i, head = unit_.head * size_;
            add_dense(step_->key + (token * step_->key_stride + head) * layout_.element_bytes(),
                      step_->value + (token * step_->value_stride + head) * layout_.element_bytes(), context + i);
        }
    }

    void add_slot(const uint8_t* slot, int position) {
        const uint8_t* value = slot + layout_.slot_row_bytes();
        if (layout_.window_bytes != 1) return add_dense(slot, value, position);
        const uint8_t* steps = value + layout_.slot_row_bytes() + sizeof(int32_t);
        folding_.add_codes(reinterpret_cast<const int8_t*>(slot), reinterpret_cast<const int8_t*>(value),
                           one_value(BFLOAT16, steps), one_value(BFLOAT16, steps + 2), batch_);
        add_position(position);
    }

    void add_dense(const uint8_t* key, const uint8_t* value, int position) {
        folding_.add_row(key, value, batch_);
        add_position(position);
    }

    void add_position(int position) {
        positions_[batch_] = position;
        if (++batch_ == Folding::capacity(source_)) fold();
    }

    // What is added next.
    void turn_to(Source source) {
        if (Folding::differ(source_, source)) fold();
        source_ = source;
    }

    // What a query of the unit sees of the batch.
    Visible visible(int query) const {
        const int first = plan_.first_seen(*unit_.request, unit_.first_query + query);
        int passed = 0;
        while (passed < batch_ && positions_[passed] < first) ++passed;
        const int keys = step_begin_ + unit_.first_query + query + 1;
        return {passed, keys < 0 ? 0 : keys < batch_ ? keys : batch_};
    }

    void fold() {
        if (batch_ == 0) return;
        folding_.fold(batch_, source_, [this](int query) { return visible(query); }, ahead_);
        step_begin_ -= batch_;
        batch_ = 0;
    }

    bool changes_out() const { return call_.out_change.matrix && step_ == &in_basis_; }

    void write() {
        const float* results = folding_.result.averages(rows_, size_);
        if (changes_out()) {
            change_back(call_.out_change, unit_.head, results, rows_, size_, changed_);
            results = changed_;
        }
        for (int i = 0; i < unit_.queries; ++i) {
            uint8_t* out = query_heads(call_.out, call_.out_stride, i);
            encode_row(layout_.storage, results + i * plan_.group * size_, plan_.group * size_, out);
        }
    }

    const Plan& plan_;
    const AttentionCall& call_;
    const Layout& layout_;
    const int size_;
    Folding folding_;
    const StepVectors in_basis_;

    Unit unit_;
    const StepVectors* step_ = nullptr;  // what the unit attends of the step
    int64_t first_token_ = 0;  // of the unit's request in this step
    int first_seen_ = 0;       // position, of any query of the unit
    int rows_ = 0;

    int batch_ = 0;  // keys collected
    Source source_ = Source::PAGES;
    int positions_[BATCH];
    Ahead ahead_;
    float* changed_ = nullptr;
    RingSlots ring_;
    int step_begin_ = 0;  // column of the batch where the step's tokens begin, negative if before it
};

template <class Folding>
void attend_by(const Plan& plan) {
    Worker<Folding> worker(plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < plan.units; ++unit) worker.attend(unit);
    if (plan.partials) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < plan.units; ++unit) worker.merge(unit);
    }
}

void expect(const Plan& plan, int64_t number) {
    if (number >= plan.units) return;
    const AttentionCall& call = plan.call;
    const Unit unit = plan.unit(number);
    const Blocks blocks = plan.blocks(unit);
    if (blocks.first < blocks.last)
        prefetch(plan.tile(unit, blocks.first), int64_t(call.block_size) * call.layout.token_bytes());
    const int context = unit.request->context;
    if (!call.window || unit.part + 1 < unit.request->parts) return;
    each_run(call, unit, first_held(call, context, plan.first_seen(*unit.request, unit.first_query)), context,
             [&](int, const uint8_t* content, int count) { prefetch(content, int64_t(count) * call.layout.slot_bytes()); });
}

void attend(const Plan& plan) {
#if defined(__AMX_BF16__)
    if (PairFold<Tiles>::serves(plan)) return attend_by<PairFold<Tiles>>(plan);
#elif defined(__AVX512BF16__)
    if (PairFold<Dots>::serves(plan)) return attend_by<PairFold<Dots>>(plan);
#endif
#if defined(__AVX512VNNI__)
    if (ByteFold::serves(plan)) return attend_by<ByteFold>(plan);
#endif
    attend_by<Fold>(plan);
}

SPARSEKV_EXPORT(attention)(const AttentionCall* call) {
    const Plan plan(*call);
    if (plan.units == 0) return;
#pragma omp parallel num_threads(call->num_threads)
    attend(plan);
}

}  // namespace sparsekv::SPARSEKV_ISA
