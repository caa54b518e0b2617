// Runs the native kernels on exactly sized heap memory, for AddressSanitizer and UBSan: any access
// outside the pages, the window or the tensors aborts. Prints the number of batches run.

#include <cstdio>
#include <memory>
#include <random>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../../kernels/attention/cpu.cpp"
#include "../../kernels/pack/cpu.cpp"
#include "../../kernels/step/cpu.cpp"
#include "../../kernels/window/cpu.cpp"

using namespace sparsekv::SPARSEKV_ISA;

namespace {

std::mt19937 rng(0);

template <class T>
struct Array {
    std::unique_ptr<T[]> data;
    explicit Array(size_t n) : data(new T[n]()) {}
    operator T*() const { return data.get(); }
};

void fill(uint8_t* out, int storage, size_t n) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < n; ++i) {
        const float x = normal(rng);
        encode_row(storage, &x, 1, out + i * storage_bits(storage) / 8);
    }
}

struct Shape {
    int head_size, group, block_size, window, window_bytes, model;
    VectorLayout key, value;
    int threads, sliding_window;
    float soft_cap;
    bool sinks, fused;
};

// Writes a history of random lengths token by token, then attends and stores one ragged step.
void run_batch(const Shape& shape) {
    const int kv_heads = 2, heads = kv_heads * shape.group, num_reqs = 4;
    const Layout layout{shape.head_size, shape.model, shape.window, shape.window_bytes, shape.key, shape.value};
    const int64_t tile = int64_t(shape.block_size) * layout.token_bytes();
    const int slots = 4, ring_blocks = (shape.window + slots - 1) / slots;

    Array<int32_t> starts(num_reqs + 1), seq_lens(num_reqs);
    const int queries[num_reqs] = {1, 0, 3, 40};
    int longest = 0;
    for (int i = 0; i < num_reqs; ++i) {
        starts[i + 1] = starts[i] + queries[i];
        seq_lens[i] = queries[i] + static_cast<int>(rng() % 300);
        longest = std::max(longest, seq_lens[i]);
    }
    const int max_blocks = (longest + shape.block_size - 1) / shape.block_size;
    const int num_blocks = 1 + num_reqs * (max_blocks + ring_blocks);
    Array<int32_t> table(num_reqs * max_blocks), ring_table(num_reqs * std::max(ring_blocks, 1));
    for (int i = 0; i < num_reqs * max_blocks; ++i) table[i] = 1 + i;
    for (int i = 0; i < num_reqs * ring_blocks; ++i) ring_table[i] = 1 + num_reqs * max_blocks + i;

    // What the sliding window has passed is outside the pages.
    Array<int32_t> seen_table(num_reqs * max_blocks);
    for (int i = 0; i < num_reqs; ++i) {
        const int first = seq_lens[i] - queries[i] - shape.sliding_window + 1;
        for (int j = 0; j < max_blocks; ++j) {
            const bool passed = shape.sliding_window && (j + 1) * shape.block_size <= first;
            seen_table[i * max_blocks + j] = passed ? num_blocks : table[i * max_blocks + j];
        }
    }
    Array<float> sinks(heads), means(kv_heads * shape.head_size);
    const int64_t square = int64_t(shape.head_size) * shape.head_size;
    Array<Float16> matrices(kv_heads * square);
    const auto feedback_of = [&](const VectorLayout& vector) {
        const bool takes = is_integer(vector.storage) && vector.survivors == shape.head_size;
        return takes ? Feedback{matrices, square, shape.head_size < 128 ? 8 : shape.head_size / 8} : Feedback{};
    };

    Array<uint8_t> pages(num_blocks * kv_heads * tile);
    const int64_t slot_tile = int64_t(slots) * layout.slot_bytes();
    Array<uint8_t> window(shape.window ? num_blocks * kv_heads * slot_tile : 1);

    // `count` tokens per request, from position first[i] on.
    const auto step = [&](const int32_t* counts, const int32_t* ends, bool attend) {
        const int tokens = counts[num_reqs];
        const size_t row = layout.row_bytes();
        Array<uint8_t> query(tokens * heads * row), out(tokens * heads * row);
        Array<uint8_t> key(tokens * kv_heads * row), value(tokens * kv_heads * row);
        fill(query, shape.model, size_t(tokens) * heads * shape.head_size);
        fill(key, shape.model, size_t(tokens) * kv_heads * shape.head_size);
        fill(value, shape.model, size_t(tokens) * kv_heads * shape.head_size);
        Array<int64_t> slot(tokens);
        for (int i = 0; i < num_reqs; ++i)
            for (int j = counts[i]; j < counts[i + 1]; ++j) {
                const int position = ends[i] - counts[i + 1] + j;
                slot[j] = int64_t(table[i * max_blocks + position / shape.block_size]) * shape.block_size +
                          position % shape.block_size;
            }
        const int64_t stride = int64_t(kv_heads) * shape.head_size;
        const PackCall pack{key, value, pages, slot, stride, stride, kv_heads * tile, tile, tokens,
                            kv_heads, shape.block_size, shape.threads, layout,
                            feedback_of(shape.key), feedback_of(shape.value)};
        const StepBatch batch{counts, ends, seen_table, ring_table, slot, max_blocks,
                              ring_blocks, tokens, num_reqs, ring_blocks};
        if (!attend || !shape.fused) SPARSEKV_KERNEL(pack)(&pack);
        if (attend) {
            const int64_t query_stride = int64_t(heads) * shape.head_size;
            const AttentionCall call{
                query, key, value, out, pages, window,
                shape.sinks ? sinks.data.get() : nullptr, query_stride, stride, stride, query_stride, kv_heads * tile, tile,
                kv_heads * slot_tile, slot_tile, heads, kv_heads, num_blocks, shape.block_size, slots, shape.threads,
                shape.sliding_window, 0.1f, shape.soft_cap, {}, layout, batch};
            if (shape.fused) {
                const Change change{matrices, means, square};
                const StepCall step{call, change, {matrices, nullptr, 0}, change, feedback_of(shape.key),
                                    feedback_of(shape.value), &batch, nullptr, nullptr, shape.window != 0};
                return SPARSEKV_KERNEL(step)(&step);
            }
            SPARSEKV_KERNEL(attention)(&call);
        }
        if (shape.window == 0) return;
        const WindowCall call{key, value, window, stride, stride, kv_heads * slot_tile, slot_tile, kv_heads, slots,
                              shape.threads, layout, batch};
        SPARSEKV_KERNEL(write_window)(&call);
    };
    Array<int32_t> history(num_reqs + 1), contexts(num_reqs);
    for (int i = 0; i < num_reqs; ++i) {
        contexts[i] = seq_lens[i] - queries[i];
        history[i + 1] = history[i] + contexts[i];
    }
    step(history, contexts, false);
    step(starts, seq_lens, true);
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
    syscall(SYS_arch_prctl, 0x1023, 18);  // asks for the tile registers
#endif
    int batches = 0;
    const int models[] = {int(FLOAT32), int(BFLOAT16), int(FLOAT16)};
    for (const int head_size : {16, 64, 80, 96, 128, 256})
        for (const int storage : {-1, int(FP8), int(INT4), int(INT3), int(INT2), int(INT4_INT2)}) {
            if (storage == INT4_INT2 && head_size % 32) continue;
            const int model = models[batches / 5 % 3];
            const int block_size = batches % 2 ? 16 : 64, window = batches % 3 ? 24 : 0;
            const int stored = storage < 0 ? model : storage;
            const int value_stored = batches % 4 && storage != INT4_INT2 ? stored : int(INT4);
            // One of `divisor` elements survives, or all of them.
            const auto survivors = [&](int storage, int divisor) {
                return storage >= INT3 ? head_size : (head_size / divisor + 3) / 4 * 4;
            };
            const VectorLayout key{survivors(stored, batches / 3 % 2 + 1), stored};
            const VectorLayout value{survivors(value_stored, batches / 2 % 3 + 1), value_stored};
            const int sliding_windows[] = {0, 1, 20, 0, 100};
            const int window_bytes = batches / 3 % 2 ? 1 : storage_bits(model) / 8;
            run_batch({head_size, 1 + batches % 7, block_size, window, window_bytes, model, key, value, 1 + batches % 2,
                       sliding_windows[batches % 5], batches % 3 == 1 ? 2.f : 0.f, batches % 4 > 1, batches % 3 != 0});
            ++batches;
        }
    std::printf("%d batches\n", batches);
}
