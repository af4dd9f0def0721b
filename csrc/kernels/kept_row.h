// Where the terms of a row are kept between its two passes.
//
// They lie in the order of the row's elements. Those of bfloat16 lie in two planes, of even and of odd elements, like
// the two vectors of a pair: so a pair may begin at any element, as it must where a gradient is stored in whole lines.
#pragma once

#include "kernels/convert.h"
#include "kernels/row_kernels.h"

namespace repo::REPO_ISA {

constexpr int64_t kBlock = kWidth > 4 ? 2048 : 1024;  // elements: a lane sums 32 to 64 terms in float

// The terms of one vector of logits: e_v, e_v t_v and e_v (t_v - t'_v), those that Terms asks for.
struct Term {
    Vec e, weighted, difference;
};

// The terms of one kind from one element on, in pairs that are `step` floats apart.
struct KeptPairs {
    float *first, *second;
    int64_t step;

    Pair load(int64_t pair) const {
        return {load_bits<Vec>(first + pair * step), load_bits<Vec>(second + pair * step)};
    }

    void store(int64_t pair, Pair x) const {
        store_bits(first + pair * step, x.first);
        store_bits(second + pair * step, x.second);
    }
};

// Returns the terms from `element` on of a row of T.
template <class T>
inline KeptPairs kept_pairs(float* row, int64_t, int64_t element, const T*) {
    return {row + element, row + element + kWidth, kPair};
}

inline KeptPairs kept_pairs(float* row, int64_t plane, int64_t element, const BFloat16*) {
    float *even = row + element / 2, *odd = even + plane;
    if (element % 2 == 0) return {even, odd, kWidth};
    return {odd, even + 1, kWidth};
}

// The terms of all kinds from one element on.
template <Terms kTerms>
struct KeptTerms {
    KeptPairs e, weighted, difference;

    template <class T>
    KeptTerms(const KeptRow& row, int64_t element, const T* type)
        : e(kept_pairs(row.e, row.plane, element, type)),
          weighted(kept_pairs(row.weighted, row.plane, element, type)),
          difference(kept_pairs(row.difference, row.plane, element, type)) {}

    void load(int64_t pair, Term& first, Term& second) const {
        const Pair x = e.load(pair), y = with_entropy(kTerms) ? weighted.load(pair) : Pair{};
        const Pair z = with_kl(kTerms) ? difference.load(pair) : Pair{};
        first = {x.first, y.first, z.first}, second = {x.second, y.second, z.second};
    }

    void store(int64_t pair, const Term& first, const Term& second) const {
        e.store(pair, {first.e, second.e});
        if (with_entropy(kTerms)) weighted.store(pair, {first.weighted, second.weighted});
        if (with_kl(kTerms)) difference.store(pair, {first.difference, second.difference});
    }
};

}  // namespace repo::REPO_ISA
