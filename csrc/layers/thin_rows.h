// Products of a large matrix with one of few columns, a rank, over a strip of the large one's columns.
#pragma once

#include "kernels/row_kernels.h"
#include "kernels/simd.h"

namespace repo::REPO_ISA {

constexpr int64_t kThinVectors = 4;                      // vectors of a row that are added to at once
constexpr int64_t kThinColumns = kThinVectors * kWidth;  // columns that they hold
constexpr int64_t kThinStrip = 256, kThinRanks = 64;     // columns and ranks that are transposed at once
constexpr int64_t kLine = 64 / sizeof(float);            // columns of a cache line
constexpr int64_t kInnerRows = 8;                        // rows whose sums stay in registers

// Adds z b to kRows rows of `out`, kThinColumns columns. z: (kRows, ranks), rows z_stride apart; b: (ranks, kThinStrip).
// prefetch: the same columns of the next rows.
template <int kRows>
inline void add_outer_block(float* out, int64_t stride, const float* z, int64_t z_stride, int64_t ranks,
                            const float* b, bool prefetch) {
    for (int i = 0; prefetch && i < kRows; ++i)
        for (int64_t c = 0; c < kThinColumns; c += kLine) __builtin_prefetch(out + (kRows + i) * stride + c, 1);
    Vec sums[kRows][kThinVectors];
    for (int i = 0; i < kRows; ++i)
        for (int64_t v = 0; v < kThinVectors; ++v) sums[i][v] = load_bits<Vec>(out + i * stride + v * kWidth);
    for (int64_t k = 0; k < ranks; ++k) {
        Vec factors[kThinVectors];
        for (int64_t v = 0; v < kThinVectors; ++v) factors[v] = load_bits<Vec>(b + k * kThinStrip + v * kWidth);
        for (int i = 0; i < kRows; ++i) {
            const Vec by = broadcast(z[i * z_stride + k]);
            for (int64_t v = 0; v < kThinVectors; ++v) sums[i][v] = multiply_add(by, factors[v], sums[i][v]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int64_t v = 0; v < kThinVectors; ++v) store_bits(out + i * stride + v * kWidth, sums[i][v]);
}

// out (rows, columns) += z b^T for at most kThinStrip columns and kThinRanks ranks. z: (rows, ranks) and b: (columns,
// ranks), the rows of both `rank` apart.
inline void add_outer_part(float* out, int64_t rows, int64_t columns, int64_t stride, const float* z, const float* b,
                           int64_t rank, int64_t ranks) {
    float factors[kThinRanks * kThinStrip];
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t k = 0; k < ranks; ++k) factors[k * kThinStrip + c] = b[c * rank + k];
    const int64_t whole = columns / kThinColumns * kThinColumns;
    for (int64_t i = 0; i < rows; i += 2) {
        const bool pair = i + 1 < rows;
        for (int64_t c = 0; c < whole; c += kThinColumns) {
            float* to = out + i * stride + c;
            if (pair)
                add_outer_block<2>(to, stride, z + i * rank, rank, ranks, factors + c, i + 4 <= rows);
            else
                add_outer_block<1>(to, stride, z + i * rank, rank, ranks, factors + c, false);
        }
        for (int64_t r = i; r < i + (pair ? 2 : 1); ++r)
            for (int64_t c = whole; c < columns; ++c) {
                float sum = out[r * stride + c];
                for (int64_t k = 0; k < ranks; ++k) sum += z[r * rank + k] * factors[k * kThinStrip + c];
                out[r * stride + c] = sum;
            }
    }
}

// out (rows, columns) += z (rows, rank) b^T, whose rows of `out` are `stride` apart. b: (columns, rank).
inline void add_outer(float* out, int64_t rows, int64_t columns, int64_t stride, const float* z, const float* b,
                      int64_t rank) {
    // so few columns that their factors stay in the first cache while the rows pass
    const int64_t fit = kThinStrip * 16 / least(kThinRanks, rank < 16 ? 16 : rank);
    const int64_t strip = fit < kThinColumns ? kThinColumns : fit / kThinColumns * kThinColumns;
    for (int64_t c = 0; c < columns; c += strip)
        for (int64_t k = 0; k < rank; k += kThinRanks)
            add_outer_part(out + c, rows, least(strip, columns - c), stride, z + k, b + c * rank + k, rank,
                           least(kThinRanks, rank - k));
}

// Adds the sums over kInnerRows or fewer rows of d[row][c] z[row][k] to sums[k][c], for 2 kWidth columns and kRanks
// ranks. z: (rows, kRanks), rows `rank` apart; sums: rows kThinStrip apart. prefetch: the same part of the next rows.
template <int kRanks>
inline void inner_block(const float* d, int64_t rows, int64_t stride, const float* z, int64_t rank, bool prefetch,
                        float* sums) {
    Vec low[kRanks], high[kRanks];
    for (int k = 0; k < kRanks; ++k) {
        low[k] = load_bits<Vec>(sums + k * kThinStrip);
        high[k] = load_bits<Vec>(sums + k * kThinStrip + kWidth);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = d + i * stride;
        if (prefetch) __builtin_prefetch(from + kInnerRows * stride);
        const Vec first = load_bits<Vec>(from), second = load_bits<Vec>(from + kWidth);
        for (int k = 0; k < kRanks; ++k) {
            const Vec by = broadcast(z[i * rank + k]);
            low[k] = multiply_add(first, by, low[k]);
            high[k] = multiply_add(second, by, high[k]);
        }
    }
    for (int k = 0; k < kRanks; ++k) {
        store_bits(sums + k * kThinStrip, low[k]);
        store_bits(sums + k * kThinStrip + kWidth, high[k]);
    }
}

// out (columns, ranks) += d^T z for at most kThinStrip columns and kThinRanks ranks; the rows of out and z are `rank`
// apart. A few rows at a time: the same columns of many rows would fall into the same sets of a cache.
inline void add_inner_part(const float* d, int64_t rows, int64_t columns, int64_t stride, const float* z, int64_t rank,
                           int64_t ranks, float* out) {
    constexpr int kRanks = 4;
    constexpr int64_t kPair = 2 * kWidth;
    float sums[kThinRanks * kThinStrip];
    std::memset(sums, 0, ranks * kThinStrip * sizeof(float));
    const int64_t whole = columns / kPair * kPair;
    for (int64_t i = 0; i < rows; i += kInnerRows) {
        const int64_t count = least(kInnerRows, rows - i);
        const bool more = i + 2 * kInnerRows <= rows;
        const float *from = d + i * stride, *by = z + i * rank;
        for (int64_t c = 0; c < whole; c += kPair) {
            int64_t k = 0;
            for (; k + kRanks <= ranks; k += kRanks)
                inner_block<kRanks>(from + c, count, stride, by + k, rank, more && !k, sums + k * kThinStrip + c);
            for (; k < ranks; ++k)
                inner_block<1>(from + c, count, stride, by + k, rank, more && !k, sums + k * kThinStrip + c);
        }
        for (int64_t c = whole; c < columns; ++c)
            for (int64_t k = 0; k < ranks; ++k)
                for (int64_t r = 0; r < count; ++r) sums[k * kThinStrip + c] += from[r * stride + c] * by[r * rank + k];
    }
    for (int64_t c = 0; c < columns; ++c)
        for (int64_t k = 0; k < ranks; ++k) out[c * rank + k] += sums[k * kThinStrip + c];
}

// out (columns, rank) += d^T z. The rows of d (rows, columns) are `stride` apart. z: (rows, rank).
inline void add_inner(const float* d, int64_t rows, int64_t columns, int64_t stride, const float* z, int64_t rank,
                      float* out) {
    for (int64_t c = 0; c < columns; c += kThinStrip)
        for (int64_t k = 0; k < rank; k += kThinRanks)
            add_inner_part(d + c, rows, least(kThinStrip, columns - c), stride, z + k, rank,
                           least(kThinRanks, rank - k), out + c * rank + k);
}

}  // namespace repo::REPO_ISA
