// The arguments and results of row kernels, and the table of the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "decoding/task.h"
#include "kernels/attention_task.h"

namespace repo {

enum DType { kFloat32, kBFloat16, kFloat16, kDTypes };

// c = log2(e) / temperature. With cap > 0, logits become cap tanh(z / cap) first.
struct Scaling {
    float c;
    float cap;
};

// The maximum that a row starts with: logits that are lower (times c) have probability 0 even before a larger one is
// seen, so that a leading block of -inf or -1e30 has t = -inf and not NaN. Between it and its negative,
// |fl(max2) - max2| <= 64.
constexpr float kLowestMax = -2147483648.0f;

// Sums over a row of e_v = 2^t_v, t_v = fma(z_v, c, -max2), max2 = fl(c max z). The term of the maximum is kept apart,
// so that the others are not lost when it has nearly all the probability.
struct RowSums {
    float max2 = kLowestMax;
    double top = 0;         // t of the maximum: the rounding error of max2
    double largest = 0;     // 2^top
    double rest = 0;        // sum of the other e_v
    double weighted = 0;    // sum e_v t_v, for the entropy
    double difference = 0;  // sum e_v (t_v - t'_v), t' of the reference, for the full KL

    // inlined, since a copy shared between instruction sets could be one that this machine cannot run
    __attribute__((always_inline)) double total() const { return rest + largest; }
};

// Which terms a row has besides e_v: e_v t_v for the entropy, e_v (t_v - t'_v) for the full KL.
enum Terms { kPlainTerms, kEntropyTerms, kKlTerms, kAllTerms, kTermKinds };

constexpr Terms terms_of(bool entropy, bool kl) { return Terms(int(entropy) | int(kl) << 1); }
constexpr bool with_entropy(Terms terms) { return terms & kEntropyTerms; }
constexpr bool with_kl(Terms terms) { return terms & kKlTerms; }

// Memory for the terms of one row, which the first pass keeps for the second. A block's terms are relative to the
// maxima that were known when it was summed. null: nothing is kept.
struct KeptRow {
    float *e = nullptr, *weighted = nullptr, *difference = nullptr;  // (2, plane): the order is in kept_row.h
    float *max2 = nullptr, *ref_max2 = nullptr;                      // (blocks,)
    int64_t plane = 0;
};

// Sizes of a kept row. A plane has space for whole vectors beyond its last element.
constexpr int64_t kept_plane(int64_t columns) { return (columns + 255) / 128 * 64; }
constexpr int64_t kept_blocks(int64_t columns) { return columns / 1024 + 1; }

// dL/dz_v = e_v (base + by_log t_v + by_difference (t_v - t'_v)) slope_v
struct GradientWeights {
    float max2, ref_max2;
    float base, by_log, by_difference;
};

// The entry of the gradient at the token of the row.
struct Target {
    int64_t column;
    float grad;
};

// Kernels over rows of `columns` consecutive elements.
//   statistics  fills sums and kept; only terms of the full KL need reference and fill ref_sums
//   gradient    writes grad, which may be the logits, with past_caches past the caches; only terms of the full KL need
//               reference. kept: of the row's statistics with at least these terms, or null
//   logit       returns one capped logit and the slope of the cap
//   fence       orders streamed stores before what the thread does next
//   exp2, soft_cap  the approximations, for tests
struct RowKernels {
    const char* name;
    void (*statistics[kDTypes][kTermKinds])(
        const void* logits, const void* reference, int64_t columns, Scaling, const KeptRow& kept, RowSums& sums,
        RowSums& ref_sums);
    void (*gradient[kDTypes][kTermKinds])(
        const void* logits, const void* reference, void* grad, int64_t columns, Scaling, const GradientWeights&,
        Target, const KeptRow& kept, bool past_caches);
    float (*logit[kDTypes])(const void* logits, int64_t column, Scaling, float* slope);
    void (*zero)(void* row, int64_t bytes);
    void (*scale[kDTypes])(void* row, int64_t columns, float factor);
    void (*fence)();
    void (*exp2)(const float* from, float* to, int64_t count);
    void (*soft_cap)(const float* from, float* value, float* slope, int64_t count, float cap);
    // see layer_rows.h
    float (*norm)(const float* x, const float* weight, float* y, int64_t columns, float epsilon);
    void (*norm_gradient)(const float* x, const float* weight, float r, const float* dy, float* dx, float* dw,
                          int64_t columns);
    void (*swiglu)(const float* gate, const float* up, float* out, int64_t columns);
    void (*swiglu_gradient)(const float* gate, const float* up, const float* grad, float* of_gate, float* of_up,
                            int64_t columns);
    void (*rotate)(const float* x, const float* cos, const float* sin, float* y, int64_t half, bool back);
    // see layers/thin_rows.h
    void (*add_outer)(float* out, int64_t rows, int64_t columns, int64_t stride, const float* z, const float* b,
                      int64_t rank);
    void (*add_inner)(const float* d, int64_t rows, int64_t columns, int64_t stride, const float* z, int64_t rank,
                      float* out);
    // see attention_rows.h
    void (*attend)(const AttentionTask&, float* scratch);
    void (*attend_gradient)(const AttentionTask&, float* scratch);
    // see decoding/rows.h
    void (*multiply_panel)(const float* tile, const float* panel, int64_t words, int64_t rows, float* out);
    void (*multiply_half_panel)(const float* tile, const float* panel, int64_t words, int64_t rows, float* out);
    void (*round_to_half)(const float* from, uint16_t* to, int64_t count);
    void (*attend_one)(const NewToken&, float* scores);
    float (*largest)(const float* x, int64_t count);
    void (*powers)(const float* x, float* out, int64_t count, float c, float max2);
};

extern const RowKernels generic_kernels;
#if defined(REPO_X86_KERNELS)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
#endif

}  // namespace repo
