// Online softmax, in base 2, of the rows of one unit, and the merge of several such results.
#pragma once

#include <cmath>

#include "rows.h"

namespace sparsekv::SPARSEKV_ISA {

// The keys [begin, end) of a batch.
struct Visible {
    int begin, end;
};

// Running maximum and sum of each row and its weighted sum of values so far.
struct Accumulator {
    float* maximum;   // rows
    float* total;     // rows
    float* weighted;  // rows x head_size

    static size_t floats(int rows, int head_size) { return size_t(rows) * (head_size + 2); }

    Accumulator(float* memory, int rows)
        : maximum(memory), total(memory + rows), weighted(memory + 2 * rows) {}

    void clear(int rows, int head_size) {
        for (int row = 0; row < rows; ++row) {
            maximum[row] = -INFINITY;
            total[row] = 0;
        }
        memset(weighted, 0, sizeof(float) * rows * head_size);
    }

    // Adds a key of this score and of value 0 to an empty row.
    void add_sink(int row, float score) {
        maximum[row] = score;
        total[row] = 1;
    }

    // Scores of a row's visible keys of n to weights, in place; those of the others and of the padding
    // up to a multiple of LANES become 0. The scores lack the keys' units and the cap, where it is not
    // 0; the weights include the values' units.
    void weigh(
        float* scores, int row, Visible visible, int n, int head_size, const float* key_units,
        const float* value_units, float soft_cap) {
        const int padded = round_up(n, LANES);
        const float seen = soft_cap == 0 ? complete<false>(scores, visible, padded, key_units, soft_cap)
                                         : complete<true>(scores, visible, padded, key_units, soft_cap);
        if (!(seen <= maximum[row])) rescale(row, seen, head_size);
        const float shift = maximum[row] == -INFINITY ? 0.f : maximum[row];
        F sums{};
        for (int i = 0; i < padded; i += LANES) {
            const F w = exp2(load(scores + i) - shift);
            store(scores + i, w * load(value_units + i));
            sums += w;
        }
        total[row] += sum(sums);
    }

    // Adds another result for the same row.
    void merge(const Accumulator& other, int row, int head_size) {
        if (!(other.maximum[row] <= maximum[row])) rescale(row, other.maximum[row], head_size);
        const float factor = weight(other.maximum[row], maximum[row]);
        total[row] += factor * other.total[row];
        for (int d = row * head_size; d < (row + 1) * head_size; d += LANES)
            store(weighted + d, load(weighted + d) + factor * load(other.weighted + d));
    }

    // The weighted sums become averages; returns them.
    const float* averages(int rows, int head_size) {
        for (int row = 0; row < rows; ++row)
            for (int d = row * head_size; d < (row + 1) * head_size; d += LANES)
                store(weighted + d, load(weighted + d) / total[row]);
        return weighted;
    }

  private:
    // Applies units, cap and mask; returns the largest score.
    template <bool CAPPED>
    static float complete(
        float* scores, Visible visible, int padded, const float* key_units, float soft_cap) {
        F greatest = broadcast(-INFINITY);
        for (int i = 0; i < padded; i += LANES) {
            F score = load(scores + i) * load(key_units + i);
            if constexpr (CAPPED) score = soft_cap * tanh(score * (1 / soft_cap));
            if (i < visible.begin || i + LANES > visible.end) {
                const I number = lane_numbers() + i;
                score = number < visible.begin ? broadcast(-INFINITY) : score;
                score = number < visible.end ? score : broadcast(-INFINITY);
            }
            store(scores + i, score);
            greatest = max(score, greatest);
        }
        return largest(greatest);
    }

    void rescale(int row, float new_maximum, int head_size) {
        const float factor = weight(maximum[row], new_maximum);
        maximum[row] = new_maximum;
        total[row] *= factor;
        for (int d = row * head_size; d < (row + 1) * head_size; d += LANES)
            store(weighted + d, load(weighted + d) * factor);
    }

    static float weight(float of, float reference) {
        return of == -INFINITY ? 0.f : exp2(broadcast(of - reference))[0];
    }
};

}  // namespace sparsekv::SPARSEKV_ISA
