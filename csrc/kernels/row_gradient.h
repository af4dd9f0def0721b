// The second pass over a row: its gradient.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/row_kernels.h"

namespace repo::REPO_ISA {

// The degree of the polynomial, whose error is far below the rounding of the gradient's type.
constexpr int power_degree(const float*) { return 5; }
constexpr int power_degree(const Float16*) { return 4; }
constexpr int power_degree(const BFloat16*) { return 3; }

// dL/dz of one row; the formula is at GradientWeights.
template <class T, bool kCapped, GradientKind kKind>
struct RowGradient {
    static constexpr int kDegree = power_degree(static_cast<const T*>(nullptr));

    float cap;
    Vec c, max2, ref_max2, base, by_log, by_difference;
    Power<kDegree> power;  // times `base` if there is no other weight

    RowGradient(Scaling scaling, const GradientWeights& w)
        : cap(scaling.cap),
          c(broadcast(scaling.c)),
          max2(broadcast(w.max2)),
          ref_max2(broadcast(w.ref_max2)),
          base(broadcast(w.base)),
          by_log(broadcast(w.by_log)),
          by_difference(broadcast(w.by_difference)),
          power(kKind == kLogpGradient ? w.base : 1.0f) {}

    Vec operator()(Vec x, Vec y) const {
        Vec slope = {};
        if (kCapped) {
            const Capped result = soft_cap(x, cap);
            x = result.value, slope = result.slope;
            if (kKind == kReferenceGradient) y = soft_cap(y, cap).value;
        }
        const Vec t = clamp_exponent(exact_multiply_subtract(x, c, max2));
        Vec grad = scaled_exp2(t, power);
        if (kKind == kEntropyGradient) grad *= multiply_add(t, by_log, base);
        if (kKind == kReferenceGradient) {
            const Vec gap = t - exact_multiply_subtract(y, c, ref_max2);
            const Vec weight = multiply_add(gap, by_difference, multiply_add(t, by_log, base));
            grad = grad == 0.0f ? Vec{} : grad * weight;  // 0 also where the reference is -inf
        }
        return kCapped ? grad * slope : grad;
    }

    Pair operator()(Pair x, Pair y) const { return {(*this)(x.first, y.first), (*this)(x.second, y.second)}; }
};

// Returns the number of elements before the first 64-byte line of `row`, at most `count`.
template <class T>
inline int64_t to_line(const T* row, int64_t count) {
    const int64_t head = (64 - reinterpret_cast<uintptr_t>(row) % 64) % 64 / sizeof(T);
    return head < count ? head : count;
}

template <class T, bool kCapped, GradientKind kKind>
void gradient_row(const T* logits, const T* reference, T* grad, int64_t columns, Scaling scaling,
                  const GradientWeights& weights, bool past_caches) {
    const RowGradient<T, kCapped, kKind> gradient(scaling, weights);
    if (kKind != kReferenceGradient) reference = logits;
    // through memory of a whole pair, so that these elements are rounded like the others
    const auto partial = [&](int64_t first, int64_t count) {
        T elements[kPair];
        put_pair<false>(elements, gradient(load_first(logits + first, count), load_first(reference + first, count)));
        std::memcpy(grad + first, elements, count * sizeof(T));
    };
    int64_t i = 0;
    for (const int64_t head = to_line(grad, columns); i < head; i += kPair < head - i ? kPair : head - i)
        partial(i, kPair < head - i ? kPair : head - i);
    if (past_caches) {
        for (; i + kPair <= columns; i += kPair)
            put_pair<true>(grad + i, gradient(load_pair(logits + i), load_pair(reference + i)));
    } else {
        for (; i + kPair <= columns; i += kPair)
            put_pair<false>(grad + i, gradient(load_pair(logits + i), load_pair(reference + i)));
    }
    if (i < columns) partial(i, columns - i);
}

template <class T>
void scale_row(T* row, int64_t columns, float factor) {
    const auto scaled = [=](Pair x) -> Pair { return {plain_nan(x.first * factor), plain_nan(x.second * factor)}; };
    int64_t i = 0;
    for (; i + kPair <= columns; i += kPair) store_pair(row + i, scaled(load_pair(row + i)));
    if (i < columns) store_first(row + i, columns - i, scaled(load_first(row + i, columns - i)));
}

inline void zero_row(void* row, int64_t bytes) {
    char* to = static_cast<char*>(row);
    int64_t i = to_line(to, bytes);
    std::memset(to, 0, i);
    for (; i + int64_t(sizeof(Vec)) <= bytes; i += sizeof(Vec)) stream(reinterpret_cast<float*>(to + i), Vec{});
    std::memset(to + i, 0, bytes - i);
}

}  // namespace repo::REPO_ISA
