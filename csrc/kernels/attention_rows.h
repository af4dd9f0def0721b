// Causal attention of one segment and one key head: small matrix products and softmax, forward and backward.
#pragma once

#include "kernels/attention_task.h"
#include "kernels/exponential.h"
#include "common/square.h"

namespace repo::REPO_ISA {

constexpr int kSums = kWidth == 16 ? 16 : 8;       // vectors of sums that fit into registers beside the factors
constexpr int kTileVectors = kWidth == 16 ? 4 : 2;

// Computes C (M, N vectors) = A (M, k) B (k, N vectors), or adds to C. Element (i, p) of A is at
// i * a_row + p * a_column.
template <int M, int N>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                          int64_t c_row, int64_t k, bool add) {
    Vec sums[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sums[i][j] = add ? load_bits<Vec>(c + i * c_row + j * kWidth) : Vec{};
    for (int64_t p = 0; p < k; ++p) {
        Vec row[N];
        for (int j = 0; j < N; ++j) row[j] = load_bits<Vec>(b + p * b_row + j * kWidth);
        for (int i = 0; i < M; ++i) {
            const Vec x = broadcast(a[i * a_row + p * a_column]);
            for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(x, row[j], sums[i][j]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) store_bits(c + i * c_row + j * kWidth, sums[i][j]);
}

// Multiplies the rows from i on, M at a time, and fewer at the end.
template <int M, int N>
inline void multiply_rows(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                          int64_t c_row, int64_t i, int64_t m, int64_t k, bool add) {
    for (; i + M <= m; i += M)
        multiply_tile<M, N>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, k, add);
    if constexpr (M > 1) {
        if (i < m) multiply_rows<M / 2, N>(a, a_row, a_column, b, b_row, c, c_row, i, m, k, add);
    }
}

// Computes C (m, n) = A (m, k) B (k, n), or adds to C; n is a multiple of kWidth.
template <int N = kTileVectors>
inline void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                     int64_t c_row, int64_t m, int64_t n, int64_t k, bool add) {
    int64_t j = 0;
    for (; j + N * kWidth <= n; j += N * kWidth)
        multiply_rows<kSums / N, N>(a, a_row, a_column, b + j, b_row, c + j, c_row, 0, m, k, add);
    if constexpr (N > 1) {
        if (j < n) multiply<N - 1>(a, a_row, a_column, b + j, b_row, c + j, c_row, m, n - j, k, add);
    }
}

inline int64_t rounded_up(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }

// Transposes (rows, columns) into `to` (columns, width), with zeros beyond `rows`; columns is a multiple of 4.
inline void transpose_into(const float* from, int64_t row, int64_t rows, int64_t columns, float* to, int64_t width) {
    const int64_t whole = rows / 4 * 4;
    for (int64_t r = 0; r < whole; r += 4)
        for (int64_t c = 0; c < columns; c += 4)
            transpose_square(from + r * row + c, row, to + c * width + r, width);
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = whole; r < rows; ++r) to[c * width + r] = from[r * row + c];
        for (int64_t r = rows; r < width; ++r) to[c * width + r] = 0;
    }
}

// Returns the factor from products to scores in units of log 2.
inline float to_log2(const AttentionTask& task) { return task.scale * 1.4426950408889634f; }

// The keys [low, high) that any of the queries [first, first + count) sees; low and width are whole vectors.
struct Seen {
    int64_t low, high, width;

    Seen(const AttentionTask& task, int64_t first, int64_t count) {
        const int64_t offset = task.keys - task.queries, start = first + offset - task.window + 1;
        low = start > 0 ? start / kWidth * kWidth : 0;
        high = first + count + offset;
        width = rounded_up(high - low);
    }
};

// Sets the scores of keys that a query does not see to -inf.
inline void hide(const AttentionTask& task, const Seen& seen, int64_t query, float* scores) {
    const int64_t last = query + task.keys - task.queries, start = last - task.window + 1 - seen.low;
    for (int64_t j = 0; j < start; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = last + 1 - seen.low; j < seen.width; ++j) scores[j] = -__builtin_inff();
}

// Replaces scores by 2^(c scores - max) with c = scale log2(e) and returns their sum; log2_sum: log2 of the softmax
// denominator.
inline float exponentials(float* scores, int64_t width, float c, float* log2_sum) {
    Vec largest = broadcast(-__builtin_inff());
    for (int64_t j = 0; j < width; j += kWidth) largest = larger(load_bits<Vec>(scores + j), largest);
    const float max = max_lanes(largest) * c;
    const Power<5> power(1.0f);
    Vec sums = {};
    for (int64_t j = 0; j < width; j += kWidth) {
        const Vec e = scaled_exp2(load_bits<Vec>(scores + j) * c - max, power);
        store_bits(scores + j, e);
        sums += e;
    }
    const float sum = sum_lanes(sums);
    *log2_sum = max + __builtin_log2f(sum);
    return sum;
}

inline void attend(const AttentionTask& task, float* scratch) {
    const int64_t width = rounded_up(task.keys), columns = task.columns;
    float *keys = scratch, *scores = keys + width * columns;
    transpose_into(task.k.data, task.k.by_token, task.keys, columns, keys, width);
    for (int64_t h = 0; h < task.heads; ++h) {
        for (int64_t first = 0; first < task.queries; first += kQueryBlock) {
            const int64_t count = task.queries - first < kQueryBlock ? task.queries - first : kQueryBlock;
            const Seen seen(task, first, count);
            float* out = task.out.row(first, h);
            multiply(task.q.row(first, h), task.q.by_token, 1, keys + seen.low, width, scores, seen.width, count,
                     seen.width, columns, false);
            float sums[kQueryBlock];
            for (int64_t i = 0; i < count; ++i) {
                float* row = scores + i * seen.width;
                hide(task, seen, first + i, row);
                float* log2_sum = task.log2_sums + h * task.tokens + first + i;
                sums[i] = exponentials(row, seen.width, to_log2(task), log2_sum);
            }
            multiply(scores, seen.width, 1, task.v.row(seen.low, 0), task.v.by_token, out, task.out.by_token, count,
                     columns, seen.high - seen.low, false);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t c = 0; c < columns; c += kWidth) {
                    float* at = out + i * task.out.by_token + c;
                    store_bits(at, load_bits<Vec>(at) / sums[i]);
                }
        }
    }
}

// Replaces scores by p, and products, which hold dL/dp, by dL/dscores = p (dL/dp - sum p dL/dp) scale.
inline void softmax_gradient(float* scores, float* products, int64_t width, float c, float log2_sum, float scale) {
    const Power<5> power(1.0f);
    Vec sums = {};
    for (int64_t j = 0; j < width; j += kWidth) {
        const Vec p = scaled_exp2(load_bits<Vec>(scores + j) * c - log2_sum, power);
        store_bits(scores + j, p);
        sums = multiply_add(p, load_bits<Vec>(products + j), sums);
    }
    const float mean = sum_lanes(sums);
    for (int64_t j = 0; j < width; j += kWidth)
        store_bits(products + j, load_bits<Vec>(scores + j) * (load_bits<Vec>(products + j) - mean) * scale);
}

inline void attend_gradient(const AttentionTask& task, float* scratch) {
    const int64_t width = rounded_up(task.keys), columns = task.columns;
    float *keys = scratch, *values = keys + width * columns, *scores = values + width * columns;
    float* products = scores + kQueryBlock * width;
    transpose_into(task.k.data, task.k.by_token, task.keys, columns, keys, width);
    transpose_into(task.v.data, task.v.by_token, task.keys, columns, values, width);
    for (int64_t j = 0; j < task.keys; ++j)
        for (int64_t c = 0; c < columns; ++c) task.dk.row(j, 0)[c] = task.dv.row(j, 0)[c] = 0;
    for (int64_t h = 0; h < task.heads; ++h) {
        for (int64_t first = 0; first < task.queries; first += kQueryBlock) {
            const int64_t count = task.queries - first < kQueryBlock ? task.queries - first : kQueryBlock;
            const Seen seen(task, first, count);
            const int64_t n = seen.width, high = seen.high - seen.low;
            const float *q = task.q.row(first, h), *grad = task.dout.row(first, h);
            multiply(q, task.q.by_token, 1, keys + seen.low, width, scores, n, count, n, columns, false);
            multiply(grad, task.dout.by_token, 1, values + seen.low, width, products, n, count, n, columns, false);
            for (int64_t i = 0; i < count; ++i) {
                hide(task, seen, first + i, scores + i * n);
                softmax_gradient(scores + i * n, products + i * n, n, to_log2(task),
                                 task.log2_sums[h * task.tokens + first + i], task.scale);
            }
            multiply(scores, 1, n, grad, task.dout.by_token, task.dv.row(seen.low, 0), task.dv.by_token, high, columns,
                     count, true);
            multiply(products, 1, n, q, task.q.by_token, task.dk.row(seen.low, 0), task.dk.by_token, high, columns,
                     count, true);
            multiply(products, n, 1, task.k.row(seen.low, 0), task.k.by_token, task.dq.row(first, h), task.dq.by_token,
                     count, columns, high, false);
        }
    }
}

}  // namespace repo::REPO_ISA
