// Decoding: products of a tile of rows with a panel of a weight, and attention of one token to its cache.
#pragma once

#include "kernels/attention_rows.h"
#include "kernels/convert.h"
#include "kernels/layer_rows.h"
#include "decoding/task.h"

namespace repo::REPO_ISA {

constexpr int kPanelVectors = int(kPanelColumns) / kWidth;
// Rows whose sums fit into registers beside a row of the panel; divides the rows of a tile.
constexpr int kRowsAtOnce = kWidth == 16 ? 16 : kWidth == 8 ? 4 : 2;
constexpr int64_t kFloatsAhead = 1024;  // the hardware does not fetch beyond a page of 4 KiB

// Adds the product of a word of the tile and the words of a panel's row.
struct OfFloats {
    static Vec add(float x, Vec weights, Vec sum) { return multiply_add(broadcast(x), weights, sum); }
};

struct OfHalves {
    static Vec add(float x, Vec weights, Vec sum) {
        const UIntVec words = bit_cast<UIntVec>(weights);
        const uint32_t word = bit_cast<uint32_t>(x);
        sum = multiply_add(broadcast(bit_cast<float>(word << 16)), bit_cast<Vec>(words << 16), sum);
        const float second = bit_cast<float>(word & 0xffff0000u);
        return multiply_add(broadcast(second), bit_cast<Vec>(words & 0xffff0000u), sum);
    }
};

template <class Product, int M>
inline void multiply_rows_of_tile(const float* tile, const float* panel, int64_t words, float* out) {
    Vec sums[M][kPanelVectors] = {};
    for (int64_t k = 0; k < words; ++k) {
        const float *weights = panel + k * kPanelColumns, *x = tile + k * kTileRows;
        __builtin_prefetch(weights + kFloatsAhead);
        Vec row[kPanelVectors];
        for (int j = 0; j < kPanelVectors; ++j) row[j] = load_bits<Vec>(weights + j * kWidth);
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < kPanelVectors; ++j) sums[i][j] = Product::add(x[i], row[j], sums[i][j]);
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < kPanelVectors; ++j) store_bits(out + i * kPanelColumns + j * kWidth, sums[i][j]);
}

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define REPO_NATIVE_BFLOAT16

// The same by an instruction that multiplies and adds up pairs; the loop is written anew since only functions of the
// same target can be inlined.
template <int M>
__attribute__((target("avx512bf16"))) inline void multiply_pairs_of_tile(const float* tile, const float* panel,
                                                                         int64_t words, float* out) {
    __m512 sums[M] = {};
    for (int64_t k = 0; k < words; ++k) {
        const float *weights = panel + k * kPanelColumns, *x = tile + k * kTileRows;
        __builtin_prefetch(weights + kFloatsAhead);
        const __m512bh row = (__m512bh)_mm512_loadu_ps(weights);
        for (int i = 0; i < M; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_set1_ps(x[i]), row);
    }
    for (int i = 0; i < M; ++i) _mm512_storeu_ps(out + i * kPanelColumns, sums[i]);
}

inline void multiply_pairs(const float* tile, const float* panel, int64_t words, int64_t rows, float* out) {
    if (rows > 12) return multiply_pairs_of_tile<16>(tile, panel, words, out);
    if (rows > 8) return multiply_pairs_of_tile<12>(tile, panel, words, out);
    if (rows > 4) return multiply_pairs_of_tile<8>(tile, panel, words, out);
    multiply_pairs_of_tile<4>(tile, panel, words, out);
}
#endif

template <class Product>
inline void multiply_rows(const float* tile, const float* panel, int64_t words, int64_t rows, float* out) {
    if constexpr (kRowsAtOnce == kTileRows) {
        if (rows > 12) return multiply_rows_of_tile<Product, 16>(tile, panel, words, out);
        if (rows > 8) return multiply_rows_of_tile<Product, 12>(tile, panel, words, out);
        if (rows > 4) return multiply_rows_of_tile<Product, 8>(tile, panel, words, out);
        multiply_rows_of_tile<Product, 4>(tile, panel, words, out);
    } else {
        for (int64_t i = 0; i < rows; i += kRowsAtOnce)
            multiply_rows_of_tile<Product, kRowsAtOnce>(tile + i, panel, words, out + i * kPanelColumns);
    }
}

// Writes out (kTileRows, kPanelColumns) = tile^T panel, sums over k in order; rows beyond `rows` have no meaning.
inline void multiply_panel(const float* tile, const float* panel, int64_t words, int64_t rows, float* out) {
    multiply_rows<OfFloats>(tile, panel, words, rows, out);
}

// The same of a tile and a panel in bfloat16.
inline void multiply_half_panel(const float* tile, const float* panel, int64_t words, int64_t rows, float* out) {
#if defined(REPO_NATIVE_BFLOAT16)
    if (__builtin_cpu_supports("avx512bf16")) return multiply_pairs(tile, panel, words, rows, out);
#endif
    multiply_rows<OfHalves>(tile, panel, words, rows, out);
}

// Rounds a multiple of 16 floats to bfloat16, to nearest even.
inline void round_to_half(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) {
        const UIntVec rounded = round_to_upper_half(plain_nan(load_bits<Vec>(from + i))) >> 16;
        store_bits(to + i, __builtin_convertvector(rounded, HalfVec));
    }
}

// Returns the largest of x, -inf if there is none; NaN does not count.
inline float largest(const float* x, int64_t count) {
    Vec found = broadcast(-__builtin_inff());
    const int64_t whole = count / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) found = larger(load_bits<Vec>(x + i), found);
    float max = max_lanes(found);
    for (int64_t i = whole; i < count; ++i) max = x[i] > max ? x[i] : max;
    return max;
}

// Writes 2^(x c - max2); max2 is the largest x c.
inline void powers(const float* x, float* out, int64_t count, float c, float max2) {
    const Power<5> power(1.0f);
    by_vectors(count, [&](auto part) {
        part.store(out, scaled_exp2(multiply_add(part.load(x), broadcast(c), broadcast(-max2)), power));
    });
}

// Writes the attention of one token. scores: queries rows of rounded_up(keys).
inline void attend_one(const NewToken& task, float* scores) {
    const int64_t width = rounded_up(task.keys);
    multiply(task.q, task.columns, 1, task.k, task.capacity, scores, width, task.queries, width, task.columns, false);
    for (int64_t i = 0; i < task.queries; ++i) {
        float *row = scores + i * width, log2_sum;
        for (int64_t j = task.keys; j < width; ++j) row[j] = -__builtin_inff();
        const float sum = exponentials(row, width, task.scale * 1.4426950408889634f, &log2_sum);
        for (int64_t j = 0; j < width; j += kWidth) store_bits(row + j, load_bits<Vec>(row + j) / sum);
    }
    multiply(scores, width, 1, task.v, task.columns, task.out, task.columns, task.queries, task.columns, task.keys,
             false);
}

}  // namespace repo::REPO_ISA
