// The blocks in which the first pass reads a row, and their largest logits.
#pragma once

#include <type_traits>

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/kept_row.h"

namespace repo::REPO_ISA {

constexpr int kStep = 2 * kPair;  // elements

// `count` logits, a multiple of kStep; those beyond the row's end are -inf.
template <class T>
struct Block {
    const T* x;
    int64_t count;
};

// Returns a whole block where it is, and the row's tail as a padded copy.
template <class T>
inline Block<T> block_of(const T* from, int64_t count, T* buffer) {
    if (count == kBlock) return {from, kBlock};
    const int64_t padded = (count + kStep - 1) / kStep * kStep;
    std::memcpy(buffer, from, count * sizeof(T));
    for (int64_t i = count; i < padded; ++i) buffer[i] = negative_infinity(from);
    return {buffer, padded};
}

// Returns cap tanh(z / cap) of the block, in the buffer.
template <class T>
inline Block<float> capped_block_of(const T* from, int64_t count, float cap, float* buffer) {
    const int64_t padded = (count + kStep - 1) / kStep * kStep;
    for (int64_t i = 0; i < padded; i += kPair) {
        const int64_t left = count - i;
        const Pair z = left >= kPair ? load_pair(from + i) : load_first(from + i, left > 0 ? left : 0);
        store_pair(buffer + i, {soft_cap(z.first, cap).value, soft_cap(z.second, cap).value});
    }
    // the padding is in the last pairs, whose elements are in the order of element_of
    for (int64_t i = count / kPair * kPair; i < padded; ++i) {
        const int64_t lane = i % kPair, base = i - lane;
        if (base + element_of(from, lane / kWidth, lane % kWidth) >= count) buffer[i] = -__builtin_inff();
    }
    return {buffer, padded};
}

// The blocks of one row of T; S is their type.
template <class T, bool kCapped>
class Blocks {
   public:
    using S = std::conditional_t<kCapped, float, T>;

    Blocks(const T* row, int64_t columns, float cap) : row(row), columns(columns), cap(cap) {}

    // Returns a block, which is valid until the next but one is asked for; beyond the row's end an empty one.
    Block<S> get(int64_t number) {
        const int64_t start = number * kBlock, count = least(kBlock, columns - start);
        if (count <= 0) return {nullptr, 0};
        S* buffer = buffers[number % 2];
        if constexpr (kCapped) return capped_block_of(row + start, count, cap, buffer);
        else return block_of(row + start, count, buffer);
    }

   private:
    const T* row;
    int64_t columns;
    float cap;
    alignas(64) S buffers[2][kBlock];
};

// The largest of logits in every lane, which are added a step at a time. 16-bit types are compared as integers, which
// have the order of positive floats and the reverse order of negative ones. NaN may be the largest.
template <class T>
struct Largest {
    ShortVec most = ShortVec{} + int16_t(INT16_MIN), least = ShortVec{} + int16_t(INT16_MAX);

    void add(const T* step) {
        for (int i = 0; i < 2; ++i) {
            const ShortVec bits = load_bits<ShortVec>(step + i * kPair);
            most = larger(bits, most);
            least = smaller(bits, least);
        }
    }

    float get() const {
        const int16_t positive = max_lanes(most), negative = min_lanes(least);
        const T x = {uint16_t(positive >= 0 ? positive : negative)};
        return load_first(&x, 1).first[0];
    }
};

template <>
struct Largest<float> {
    Vec lanes = broadcast(-__builtin_inff());

    void add(const float* step) {
        for (int i = 0; i < 4; ++i) lanes = larger(load_bits<Vec>(step + i * kWidth), lanes);
    }

    float get() const { return max_lanes(lanes); }
};

template <class S>
inline float block_max(Block<S> block) {
    Largest<S> largest;
    for (int64_t step = 0; step < block.count; step += kStep) largest.add(block.x + step);
    return largest.get();
}

}  // namespace repo::REPO_ISA
