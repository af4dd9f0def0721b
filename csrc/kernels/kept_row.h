// Where the exponentials of a row are kept between its two passes.
//
// They lie in the order of the row's elements. Those of bfloat16 lie in two planes, of even and of odd elements, which
// are the two vectors of a pair: so a pair may begin at any element, as it must for the gradient to be stored in whole
// lines.
#pragma once

#include "kernels/convert.h"
#include "kernels/row_kernels.h"

namespace repo::REPO_ISA {

constexpr int64_t kBlock = kWidth > 4 ? 2048 : 1024;  // elements: a lane sums 32 to 64 terms in float

// The pairs of kept exponentials that begin at one element; a type's pairs are `step` floats apart.
struct KeptPairs {
    float *first, *second;
    int64_t step;

    KeptPairs from_pair(int64_t pair) const { return {first + pair * step, second + pair * step, step}; }

    Pair load() const { return {load_bits<Vec>(first), load_bits<Vec>(second)}; }

    void store(Pair e) const {
        store_bits(first, e.first);
        store_bits(second, e.second);
    }
};

template <class T>
inline KeptPairs kept_from(const KeptRow& row, int64_t element, const T*) {
    float* first = row.exponentials + element;
    return {first, first + kWidth, kPair};
}

inline KeptPairs kept_from(const KeptRow& row, int64_t element, const BFloat16*) {
    float *even = row.exponentials + element / 2, *odd = even + row.plane;
    if (element % 2 == 0) return {even, odd, kWidth};
    return {odd, even + 1, kWidth};
}

}  // namespace repo::REPO_ISA
