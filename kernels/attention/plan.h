// The arguments of one attention call and how its work is divided.
#pragma once

#include <cstdint>

#include "../cpu/layout.h"
#include "../cpu/scratch.h"
#include "../cpu/step_batch.h"
#include "softmax.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int TILE_ROWS = 192;  // query rows of one unit, where the group allows
constexpr int MIN_PART = 256;  // tokens of history worth a unit of their own
constexpr int UNITS_PER_THREAD = 4;

// What rows are multiplied with, (head_size x head_size) per KV head, and the mean that is taken off
// before or added after. Without a matrix nothing changes. Mirrors calls.Change.
struct Change {
    const Float16* matrix;
    const float* mean;
    int64_t matrix_stride;  // 0: all heads share it
};

// Mirrors calls.AttentionCall. Strides count elements, those of pages and window bytes.
struct AttentionCall {
    const uint8_t *query, *key, *value;
    uint8_t* out;
    const uint8_t *pages, *window;
    const float* sinks;  // one per query head, or nullptr
    int64_t query_stride, key_stride, value_stride, out_stride;
    int64_t page_stride, page_head_stride, window_stride, window_head_stride;
    int32_t num_heads, num_kv_heads, num_blocks, block_size, slots_per_block, num_threads;
    int32_t sliding_window;  // 0: none
    float scale;
    float soft_cap;  // 0: none
    Change out_change;
    Layout layout;
    StepBatch batch;
};

// A step's vectors. Strides count elements from token to token.
struct StepVectors {
    const uint8_t *query, *key, *value;
    int64_t query_stride, key_stride, value_stride;

    explicit StepVectors(const AttentionCall& call)
        : query(call.query), key(call.key), value(call.value), query_stride(call.query_stride),
          key_stride(call.key_stride), value_stride(call.value_stride) {}
};

// The units of one request: per KV head, per tile of queries, per part of the history the tile sees.
struct Request {
    int32_t context, query_len, tiles, parts;
    int64_t first_unit;
    int64_t first_partial;  // of the results waiting to be merged, where parts > 1
};

// A unit: one KV head, one tile of queries (its rows: query by query, head by head), one part.
struct Unit {
    const Request* request;
    int32_t index, head, first_query, queries, part;
    int64_t partial;
};

// Of the block table, [first, last).
struct Blocks {
    int64_t first, last;
};

// Lives until the next plan of its thread.
struct Plan {
    const AttentionCall& call;
    const StepVectors* given;  // by the model, for requests without a history, who need no basis; nullptr: none
    Request* requests;
    float* partial_results;  // an Accumulator each
    int group;         // query heads per KV head
    int tile_queries;  // queries of one unit at most
    int reach;         // positions a query sees at most, its own included
    int rows = 0;      // rows of one unit at most
    int64_t units = 0, partials = 0;

    explicit Plan(const AttentionCall& call, const StepVectors* given = nullptr) : call(call), given(given) {
        thread_local Scratch request_memory, partial_memory;
        requests = static_cast<Request*>(request_memory.reserve(call.batch.num_reqs * sizeof(Request)));
        group = call.num_heads / call.num_kv_heads;
        tile_queries = group >= TILE_ROWS ? 1 : TILE_ROWS / group;
        reach = call.sliding_window ? call.sliding_window : INT32_MAX;
        int64_t tokens = 0;
        for (int i = 0; i < call.batch.num_reqs; ++i) {
            Request& request = requests[i];
            request.query_len = call.batch.query_len(i);
            request.context = call.batch.seq_lens[i] - request.query_len;
            request.tiles = (request.query_len + tile_queries - 1) / tile_queries;
            for (int tile = 0; tile < request.tiles; ++tile)
                tokens += int64_t(call.num_kv_heads) * history(request, tile * tile_queries);
            const int queries = request.query_len < tile_queries ? request.query_len : tile_queries;
            if (queries * group > rows) rows = queries * group;
        }
        int64_t part = tokens / (int64_t(call.num_threads) * UNITS_PER_THREAD);
        if (part < MIN_PART) part = MIN_PART;
        for (int i = 0; i < call.batch.num_reqs; ++i) {
            Request& request = requests[i];
            request.parts = 1;
            // No tile sees more of the history than the first one.
            const int longest = history(request, 0);
            if (call.num_threads > 1 && longest > part)
                request.parts = static_cast<int32_t>((longest + part - 1) / part);
            request.first_unit = units;
            request.first_partial = partials;
            const int64_t count = int64_t(call.num_kv_heads) * request.tiles * request.parts;
            units += count;
            if (request.parts > 1) partials += count;
        }
        const size_t partial = Accumulator::floats(rows, call.layout.head_size) * sizeof(float);
        partial_results = static_cast<float*>(partial_memory.reserve(partials * partial));
    }

    // The first position that a query of the request sees.
    int first_seen(const Request& request, int query) const {
        const int first = request.context + query - reach + 1;
        return first > 0 ? first : 0;
    }

    // Tokens of the history that a query of the request sees.
    int history(const Request& request, int query) const {
        const int first = first_seen(request, query);
        return first < request.context ? request.context - first : 0;
    }

    // Those a unit reads.
    Blocks blocks(const Unit& unit) const {
        const int64_t parts = unit.request->parts, size = call.block_size;
        const int64_t first = first_seen(*unit.request, unit.first_query) / size;
        const int64_t end = (unit.request->context + size - 1) / size, count = end > first ? end - first : 0;
        return {first + count * unit.part / parts, first + count * (unit.part + 1) / parts};
    }

    // A unit's tokens of a block.
    const uint8_t* tile(const Unit& unit, int64_t block) const {
        return call.pages + call.batch.pages(unit.index)[block] * call.page_stride + unit.head * call.page_head_stride;
    }

    Unit unit(int64_t number) const {
        int low = 0, high = call.batch.num_reqs - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (requests[middle].first_unit <= number) low = middle;
            else high = middle - 1;
        }
        const Request& request = requests[low];
        const int64_t in_request = number - request.first_unit;
        const int64_t tile = in_request / request.parts;
        Unit unit;
        unit.request = &request;
        unit.index = low;
        unit.part = static_cast<int32_t>(in_request % request.parts);
        unit.head = static_cast<int32_t>(tile / request.tiles);
        // Later tiles read more keys, so they go first.
        unit.first_query = (request.tiles - 1 - static_cast<int32_t>(tile % request.tiles)) * tile_queries;
        const int left = request.query_len - unit.first_query;
        unit.queries = left < tile_queries ? left : tile_queries;
        unit.partial = request.first_partial + in_request;
        return unit;
    }
};

// Asks for what a unit reads first.
void expect(const Plan& plan, int64_t number);

// All units of the plan, by the threads of the region it is called in; they leave together.
void attend(const Plan& plan);

}  // namespace sparsekv::SPARSEKV_ISA
