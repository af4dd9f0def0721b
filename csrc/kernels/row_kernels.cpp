// The kernels of one instruction set. This file is compiled once for each REPO_ISA.
#include "kernels/row_kernels.h"

#include "kernels/attention_rows.h"
#include "decoding/rows.h"
#include "kernels/layer_rows.h"
#include "kernels/row_gradient.h"
#include "kernels/row_sums.h"
#include "layers/thin_rows.h"

namespace repo {
namespace REPO_ISA {
namespace {

template <class T, Terms kTerms>
void statistics(const void* logits, const void* reference, int64_t columns, Scaling scaling, const KeptRow& kept,
                RowSums& sums, RowSums& ref_sums) {
    const auto run = scaling.cap > 0 ? sum_row<T, true, kTerms> : sum_row<T, false, kTerms>;
    run(static_cast<const T*>(logits), static_cast<const T*>(reference), columns, scaling, kept, sums, ref_sums);
}

template <class T, Terms kTerms>
void gradient_of(const void* logits, const void* reference, void* grad, int64_t columns, Scaling scaling,
                 const GradientWeights& weights, Target target, const KeptRow& kept, bool past_caches) {
    const auto run = scaling.cap > 0 ? gradient_row<T, true, kTerms> : gradient_row<T, false, kTerms>;
    run(static_cast<const T*>(logits), static_cast<const T*>(reference), static_cast<T*>(grad), columns, scaling,
        weights, target, kept, past_caches);
}

// Uses the code of the kernels, so that the target's logit has the same bits as there.
template <class T>
float logit(const void* logits, int64_t column, Scaling scaling, float* slope) {
    const Vec x = load_first(static_cast<const T*>(logits) + column, 1).first;
    *slope = 1;
    if (!(scaling.cap > 0)) return x[0];
    const Capped result = soft_cap(x, scaling.cap);
    *slope = result.slope[0];
    return result.value[0];
}

template <class T>
void scale(void* row, int64_t columns, float factor) {
    scale_row(static_cast<T*>(row), columns, factor);
}

// The two below serve tests of the approximations.
void exp2_of(const float* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kPair) {
        const int64_t n = count - i < kPair ? count - i : kPair;
        const Pair t = load_first(from + i, n);
        const Power<5> power(1.0f);
        store_first(to + i, n, {scaled_exp2(t.first, power), scaled_exp2(t.second, power)});
    }
}

void soft_cap_of(const float* from, float* value, float* slope, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += kPair) {
        const int64_t n = count - i < kPair ? count - i : kPair;
        const Pair z = load_first(from + i, n);
        const Capped low = soft_cap(z.first, cap), high = soft_cap(z.second, cap);
        store_first(value + i, n, {low.value, high.value});
        store_first(slope + i, n, {low.slope, high.slope});
    }
}

}  // namespace
}  // namespace REPO_ISA

#define REPO_STRING_OF(name) #name
#define REPO_STRING(name) REPO_STRING_OF(name)
#define REPO_TABLE_OF(isa) isa##_kernels
#define REPO_TABLE(isa) REPO_TABLE_OF(isa)

using namespace REPO_ISA;

#define REPO_BY_TERMS(kernel, T) \
    {kernel<T, kPlainTerms>, kernel<T, kEntropyTerms>, kernel<T, kKlTerms>, kernel<T, kAllTerms>}

extern const RowKernels REPO_TABLE(REPO_ISA);
const RowKernels REPO_TABLE(REPO_ISA) = {
    REPO_STRING(REPO_ISA),
    {REPO_BY_TERMS(statistics, float), REPO_BY_TERMS(statistics, BFloat16), REPO_BY_TERMS(statistics, Float16)},
    {REPO_BY_TERMS(gradient_of, float), REPO_BY_TERMS(gradient_of, BFloat16), REPO_BY_TERMS(gradient_of, Float16)},
    {logit<float>, logit<BFloat16>, logit<Float16>},
    zero_row,
    {scale<float>, scale<BFloat16>, scale<Float16>},
    fence_streams,
    exp2_of,
    soft_cap_of,
    norm_row,
    norm_gradient_row,
    swiglu_row,
    swiglu_gradient_row,
    rotate_row,
    add_outer,
    add_inner,
    attend,
    attend_gradient,
    multiply_panel,
    multiply_half_panel,
    round_to_half,
    attend_one,
    largest,
    powers,
};

}  // namespace repo
