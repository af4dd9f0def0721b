// The second pass over a row: its gradient.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/kept_row.h"
#include "kernels/row_kernels.h"

namespace repo::REPO_ISA {

// The degree of the polynomial, whose error is far below the rounding of the gradient's type.
constexpr int power_degree(const float*) { return 5; }
constexpr int power_degree(const Float16*) { return 4; }
constexpr int power_degree(const BFloat16*) { return 3; }

// dL/dz, from logits or from kept terms; the formula is at GradientWeights.
template <class T, bool kCapped, Terms kTerms, bool kKept>
struct RowGradient {
    static constexpr int kDegree = power_degree(static_cast<const T*>(nullptr));
    static constexpr bool kPlain = kTerms == kPlainTerms;

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
          power(kPlain ? w.base : 1.0f) {}

    Vec of_logits(Vec x, Vec y) const {
        const Vec t = exact_multiply_subtract(x, c, max2), e = scaled_exp2(t, power);
        if (kPlain) return e;
        Vec weight = base;
        if (with_entropy(kTerms)) weight = multiply_add(clamp_exponent(t), by_log, weight);
        if (with_kl(kTerms)) weight = multiply_add(t - exact_multiply_subtract(y, c, ref_max2), by_difference, weight);
        return e == 0.0f ? Vec{} : e * weight;  // 0 also where the reference is -inf
    }

    Vec of_term(const Term& term) const {
        Vec grad = term.e * base;
        if (with_entropy(kTerms)) grad = multiply_add(term.weighted, by_log, grad);
        if (with_kl(kTerms)) grad = multiply_add(term.difference, by_difference, grad);
        return grad;
    }

    // x, y: logits and the reference's; kept: their terms, number `pair`
    Pair operator()(Pair x, Pair y, const KeptTerms<kTerms>& kept, int64_t pair) const {
        Capped first = {x.first, {}}, second = {x.second, {}};
        if (kCapped) first = soft_cap(x.first, cap), second = soft_cap(x.second, cap);
        Pair grad;
        if (kKept) {
            Term low, high;
            kept.load(pair, low, high);
            grad = {of_term(low), of_term(high)};
        } else {
            if (kCapped && with_kl(kTerms)) y = {soft_cap(y.first, cap).value, soft_cap(y.second, cap).value};
            grad = {of_logits(first.value, y.first), of_logits(second.value, y.second)};
        }
        return kCapped ? Pair{grad.first * first.slope, grad.second * second.slope} : grad;
    }
};

// The rows of one token, and the entry of the gradient that is not computed from them.
template <class T>
struct GradientRows {
    const T *logits, *reference;
    T* grad;
    const KeptRow& kept;
    int64_t target;
    T target_grad;
    bool past_caches;
};

// Stores a pair that lies in memory; `to` is aligned to a vector.
template <class T>
inline void copy_pair(const T* from, T* to, bool past_caches) {
    if (!past_caches) return static_cast<void>(std::memcpy(to, from, kPair * sizeof(T)));
    const char* bytes = reinterpret_cast<const char*>(from);
    for (int i = 0; i < int(kPair * sizeof(T)); i += sizeof(Vec))
        stream(reinterpret_cast<float*>(reinterpret_cast<char*>(to) + i), load_bits<Vec>(bytes + i));
}

// Writes the gradient of elements [start, end).
template <class T, bool kCapped, Terms kTerms, bool kKept>
inline void write_gradient(const GradientRows<T>& rows, int64_t start, int64_t end,
                           const RowGradient<T, kCapped, kTerms, kKept>& gradient) {
    const auto terms_from = [&](int64_t element) { return KeptTerms<kTerms>(rows.kept, element, rows.logits); };
    // Writes a pair, of which `count` elements are needed, to memory.
    const auto compute = [&](int64_t first, int64_t count, T* elements) {
        const Pair x = load_first(rows.logits + first, count), y = load_first(rows.reference + first, count);
        put_pair<false>(elements, gradient(x, y, terms_from(first), 0));
        if (first <= rows.target && rows.target < first + count) elements[rows.target - first] = rows.target_grad;
    };
    const auto partial = [&](int64_t first, int64_t count) {
        alignas(64) T elements[kPair];
        compute(first, count, elements);
        std::memcpy(rows.grad + first, elements, count * sizeof(T));
    };
    const int64_t body = start + least(to_line(rows.grad + start), end - start), pairs = (end - body) / kPair;
    for (int64_t i = start; i < body; i += kPair) partial(i, least(kPair, body - i));

    const auto terms = terms_from(body);
    const auto pair = [&](int64_t n) {
        const int64_t i = body + n * kPair;
        return gradient(load_pair(rows.logits + i), load_pair(rows.reference + i), terms, n);
    };
    T* grad = rows.grad + body;
    const int64_t target_pair = rows.target >= body ? (rows.target - body) / kPair : -1;
    for (int64_t n = 0, stop; n < pairs; n = stop + 1) {
        stop = n <= target_pair ? least(target_pair, pairs) : pairs;
        if (rows.past_caches) {
            for (; n < stop; ++n) put_pair<true>(grad + n * kPair, pair(n));
        } else {
            for (; n < stop; ++n) put_pair<false>(grad + n * kPair, pair(n));
        }
        if (stop == pairs) break;
        // the target's entry is replaced before its line is stored: the line would have to be read again after it
        alignas(64) T elements[kPair];
        compute(body + stop * kPair, kPair, elements);
        copy_pair(elements, grad + stop * kPair, rows.past_caches);
    }
    if (body + pairs * kPair < end) partial(body + pairs * kPair, end - body - pairs * kPair);
}

// Returns the weights of terms that are relative to these maxima.
inline GradientWeights shifted(const GradientWeights& w, float max2, float ref_max2) {
    const double shift = double(max2) - w.max2, ref_shift = double(ref_max2) - w.ref_max2, scale = exp2_or_zero(shift);
    const double base = w.base + w.by_log * shift + w.by_difference * (shift - ref_shift);
    return {max2, ref_max2, float(scale * base), float(scale * w.by_log), float(scale * w.by_difference)};
}

// Writes the gradient of a row from its kept terms, blocks with the same maxima together.
template <class T, bool kCapped, Terms kTerms>
inline void write_kept_gradient(const GradientRows<T>& rows, int64_t columns, Scaling scaling,
                                const GradientWeights& weights) {
    const float *max2 = rows.kept.max2, *ref_max2 = rows.kept.ref_max2;
    const int64_t blocks = (columns + kBlock - 1) / kBlock;
    for (int64_t block = 0, next; block < blocks; block = next) {
        for (next = block + 1; next < blocks && max2[next] == max2[block] && ref_max2[next] == ref_max2[block];) ++next;
        const GradientWeights w = shifted(weights, max2[block], ref_max2[block]);
        const int64_t start = block * kBlock, end = least(next * kBlock, columns);
        if (exp2_or_zero(double(max2[block]) - weights.max2) == 0) {
            // also where a term of the KL is infinite, since the reference is -inf
            write_gradient(rows, start, end, RowGradient<T, kCapped, kPlainTerms, true>(scaling, w));
        } else {
            write_gradient(rows, start, end, RowGradient<T, kCapped, kTerms, true>(scaling, w));
        }
    }
}

template <class T, bool kCapped, Terms kTerms>
void gradient_row(const T* logits, const T* reference, T* grad, int64_t columns, Scaling scaling,
                  const GradientWeights& weights, Target target, const KeptRow& kept, bool past_caches) {
    GradientRows<T> rows = {logits, with_kl(kTerms) ? reference : logits, grad, kept, target.column, {}, past_caches};
    store_first(&rows.target_grad, 1, {plain_nan(broadcast(target.grad)), Vec{}});
    if (kept.e) return write_kept_gradient<T, kCapped, kTerms>(rows, columns, scaling, weights);
    write_gradient(rows, 0, columns, RowGradient<T, kCapped, kTerms, false>(scaling, weights));
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
