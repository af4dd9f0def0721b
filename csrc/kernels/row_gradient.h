// The second pass over a row: its gradient.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/kept_row.h"
#include "kernels/row_kernels.h"

extern "C" double exp2(double);

namespace repo::REPO_ISA {

// The degree of the polynomial, whose error is far below the rounding of the gradient's type.
constexpr int power_degree(const float*) { return 5; }
constexpr int power_degree(const Float16*) { return 4; }
constexpr int power_degree(const BFloat16*) { return 3; }

// dL/dz of one row; the formula is at GradientWeights. kKept: e_v is given, up to a factor; else it is computed from x.
template <class T, bool kCapped, GradientKind kKind, bool kKept>
struct RowGradient {
    static constexpr int kDegree = power_degree(static_cast<const T*>(nullptr));

    float cap;
    Vec c, max2, ref_max2, base, by_log, by_difference, factor;
    Power<kDegree> power;

    // e_factor: what e_v is to be multiplied by
    RowGradient(Scaling scaling, const GradientWeights& w, float e_factor)
        : cap(scaling.cap),
          c(broadcast(scaling.c)),
          max2(broadcast(w.max2)),
          ref_max2(broadcast(w.ref_max2)),
          base(broadcast(w.base)),
          by_log(broadcast(w.by_log)),
          by_difference(broadcast(w.by_difference)),
          factor(broadcast(kKind == kLogpGradient ? e_factor * w.base : e_factor)),
          power(factor[0]) {}

    Vec operator()(Vec x, Vec y, Vec e) const {
        Vec slope = {};
        if (kCapped) {
            const Capped result = soft_cap(x, cap);
            x = result.value, slope = result.slope;
            if (kKind == kReferenceGradient) y = soft_cap(y, cap).value;
        }
        const Vec t = exact_multiply_subtract(x, c, max2);
        Vec grad = kKept ? e * factor : scaled_exp2(t, power);
        if (kKind == kEntropyGradient) grad *= multiply_add(clamp_exponent(t), by_log, base);
        if (kKind == kReferenceGradient) {
            const Vec gap = t - exact_multiply_subtract(y, c, ref_max2);
            const Vec weight = multiply_add(gap, by_difference, multiply_add(t, by_log, base));
            grad = grad == 0.0f ? Vec{} : grad * weight;  // 0 also where the reference is -inf
        }
        return kCapped ? grad * slope : grad;
    }

    Pair operator()(Pair x, Pair y, Pair e) const {
        return {(*this)(x.first, y.first, e.first), (*this)(x.second, y.second, e.second)};
    }
};

// The rows of one call.
template <class T>
struct GradientRows {
    const T *logits, *reference;
    T* grad;
    KeptRow kept;
};

// Writes the gradient of elements [start, end).
template <bool kKept, class T, class Gradient>
inline void write_gradient(const GradientRows<T>& rows, int64_t start, int64_t end, const Gradient& gradient,
                           bool past_caches) {
    const auto pair = [&](int64_t i, const KeptPairs& e) {
        return gradient(load_pair(rows.logits + i), load_pair(rows.reference + i), kKept ? e.load() : Pair{});
    };
    // through memory of a whole pair, so that these elements are rounded like the others
    const auto partial = [&](int64_t first, int64_t count) {
        T elements[kPair];
        const Pair x = load_first(rows.logits + first, count), y = load_first(rows.reference + first, count);
        put_pair<false>(elements, gradient(x, y, kKept ? kept_from(rows.kept, first, rows.logits).load() : Pair{}));
        std::memcpy(rows.grad + first, elements, count * sizeof(T));
    };
    int64_t i = start;
    for (const int64_t head = i + least(to_line(rows.grad + i), end - i); i < head; i += least(kPair, head - i))
        partial(i, least(kPair, head - i));
    const KeptPairs kept = kept_from(rows.kept, i, rows.logits);
    if (past_caches) {
        for (int64_t n = 0; i + kPair <= end; i += kPair, ++n) put_pair<true>(rows.grad + i, pair(i, kept.from_pair(n)));
    } else {
        for (int64_t n = 0; i + kPair <= end; i += kPair, ++n) put_pair<false>(rows.grad + i, pair(i, kept.from_pair(n)));
    }
    if (i < end) partial(i, end - i);
}

template <class T, bool kCapped, GradientKind kKind>
void gradient_row(const T* logits, const T* reference, T* grad, int64_t columns, Scaling scaling,
                  const GradientWeights& weights, const KeptRow& kept, bool past_caches) {
    const GradientRows<T> rows = {logits, kKind == kReferenceGradient ? reference : logits, grad, kept};
    if (!kept.exponentials) {
        const RowGradient<T, kCapped, kKind, false> gradient(scaling, weights, 1);
        return write_gradient<false>(rows, 0, columns, gradient, past_caches);
    }
    // blocks with the same maximum together
    for (int64_t start = 0, end; start < columns; start = end) {
        const float max2 = kept.max2[start / kBlock];
        for (end = start + kBlock; end < columns && kept.max2[end / kBlock] == max2;) end += kBlock;
        const RowGradient<T, kCapped, kKind, true> gradient(scaling, weights, exp2(double(max2) - weights.max2));
        write_gradient<true>(rows, start, least(end, columns), gradient, past_caches);
    }
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
    int64_t i = least(to_line(to), bytes);
    std::memset(to, 0, i);
    for (; i + int64_t(sizeof(Vec)) <= bytes; i += sizeof(Vec)) stream(reinterpret_cast<float*>(to + i), Vec{});
    std::memset(to + i, 0, bytes - i);
}

}  // namespace repo::REPO_ISA
