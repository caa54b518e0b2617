// Scores and weighted sums of many query rows: vectors are expanded to a dense tile once, then two
// register-blocked matrix products run over it.
#pragma once

#include "rows.h"

namespace sparsekv::SPARSEKV_ISA {

constexpr int PRODUCT_WIDTH = LANES == 16 ? 4 : 2;  // the sums fit registers
constexpr int PRODUCT_ROWS = 6;

// c (ROWS x WIDTH * LANES) [+]= a (ROWS x depth) b (depth x WIDTH * LANES), row strides given.
template <int ROWS, int WIDTH, class B>
inline void product_block(
    const float* a, int a_stride, const B* b, int b_stride, float* c, int c_stride, int depth,
    bool accumulate) {
    F sums[ROWS][WIDTH] = {};
    for (int i = 0; i < depth; ++i) {
        F x[WIDTH];
        for (int w = 0; w < WIDTH; ++w) x[w] = load(b + i * b_stride + w * LANES);
        for (int row = 0; row < ROWS; ++row) {
            const F y = broadcast(a[row * a_stride + i]);
            for (int w = 0; w < WIDTH; ++w) sums[row][w] += y * x[w];
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int w = 0; w < WIDTH; ++w) {
            float* sum = c + row * c_stride + w * LANES;
            store(sum, accumulate ? load(sum) + sums[row][w] : sums[row][w]);
        }
}

template <int ROWS, class B>
void product_rows(
    const float* a, int a_stride, const B* b, int b_stride, float* c, int c_stride, int depth,
    int columns, bool accumulate) {
    constexpr int WIDTH = PRODUCT_WIDTH;
    int j = 0;
    for (; j + WIDTH * LANES <= columns; j += WIDTH * LANES)
        product_block<ROWS, WIDTH>(a, a_stride, b + j, b_stride, c + j, c_stride, depth, accumulate);
    if constexpr (WIDTH > 2)
        for (; j + 2 * LANES <= columns; j += 2 * LANES)
            product_block<ROWS, 2>(a, a_stride, b + j, b_stride, c + j, c_stride, depth, accumulate);
    for (; j < columns; j += LANES)
        product_block<ROWS, 1>(a, a_stride, b + j, b_stride, c + j, c_stride, depth, accumulate);
}

// c (rows x columns) [+]= a (rows x depth) b (depth x columns); columns is a multiple of LANES. Long
// sums are those of their parts, which loses less.
template <class B>
inline void product(
    const float* a, int a_stride, const B* b, int b_stride, float* c, int c_stride, int rows, int depth,
    int columns, bool accumulate) {
    constexpr int PART = 128;
    for (; depth > PART; depth -= PART, a += PART, b += int64_t(PART) * b_stride, accumulate = true)
        product(a, a_stride, b, b_stride, c, c_stride, rows, PART, columns, accumulate);
    constexpr decltype(&product_rows<1, B>) LAST[] = {
        product_rows<1, B>, product_rows<2, B>, product_rows<3, B>, product_rows<4, B>, product_rows<5, B>};
    for (; rows >= PRODUCT_ROWS; rows -= PRODUCT_ROWS, a += PRODUCT_ROWS * a_stride, c += PRODUCT_ROWS * c_stride)
        product_rows<PRODUCT_ROWS>(a, a_stride, b, b_stride, c, c_stride, depth, columns, accumulate);
    if (rows) LAST[rows - 1](a, a_stride, b, b_stride, c, c_stride, depth, columns, accumulate);
}

// n vectors to dense rows of head_size floats, without their units but with their zeros.
template <int STORAGE>
void expand_rows(const Vectors& x, int n, int head_size, float* out) {
    for (int i = 0; i < n; ++i) {
        Walk<STORAGE> walk(x.values + i * x.stride, x.bitmap + i * (head_size / 8));
        const float zero = is_packed(STORAGE) ? x.zeros[i] : 0.f;
        for (int d = 0; d < head_size; d += LANES) store(out + i * head_size + d, walk.next() - zero);
    }
}

inline void expand_rows(int storage, const Vectors& x, int n, int head_size, float* out) {
    switch (storage) {
        case FLOAT32: return expand_rows<FLOAT32>(x, n, head_size, out);
        case BFLOAT16: return expand_rows<BFLOAT16>(x, n, head_size, out);
        case FLOAT16: return expand_rows<FLOAT16>(x, n, head_size, out);
        case INT4: return expand_rows<INT4>(x, n, head_size, out);
        case BFLOAT16 + WHOLE: return expand_rows<BFLOAT16 + WHOLE>(x, n, head_size, out);
        case FLOAT16 + WHOLE: return expand_rows<FLOAT16 + WHOLE>(x, n, head_size, out);
        case INT3 + WHOLE: return expand_rows<INT3 + WHOLE>(x, n, head_size, out);
        case INT2 + WHOLE: return expand_rows<INT2 + WHOLE>(x, n, head_size, out);
        default: return expand_rows<INT4 + WHOLE>(x, n, head_size, out);
    }
}

// 8 x 8 block of x (row stride x_stride) to its transpose in out.
inline void transpose8(const float* x, int x_stride, float* out, int out_stride) {
#if defined(__AVX2__)
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(x + i * x_stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) out[j * out_stride + i] = x[i * x_stride + j];
#endif
}

// (n x head_size) rows to (head_size x BATCH); n is rounded up to a multiple of 8.
inline void transpose_rows(const float* rows, int n, int head_size, float* out) {
    for (int i = 0; i < n; i += 8)
        for (int d = 0; d < head_size; d += 8)
            transpose8(rows + i * head_size + d, head_size, out + d * BATCH + i, BATCH);
}

}  // namespace sparsekv::SPARSEKV_ISA
