// The first pass over a row, in blocks that stay in L1: each is searched for a new maximum and then summed.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/row_kernels.h"

extern "C" double exp2(double);

namespace repo::REPO_ISA {

constexpr int kStep = 2 * kPair;  // elements
constexpr int64_t kBlock = kWidth > 4 ? 2048 : 1024;  // elements: a lane sums 32 to 64 terms in float

// `count` logits, a multiple of kStep; those beyond the row's end are -inf.
template <class T>
struct Block {
    const T* x;
    int64_t count;
};

// Returns a whole block where it is, and the row's tail as a padded copy.
template <class T>
inline Block<T> block_of(const T* from, int64_t count, float, T* buffer) {
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

template <class T>
inline float block_max(Block<T> block) {
    Vec m[4];
    for (Vec& part : m) part = broadcast(-__builtin_inff());
    for (int64_t i = 0; i < block.count; i += kStep) {
        const Pair low = load_pair(block.x + i), high = load_pair(block.x + i + kPair);
        m[0] = larger(low.first, m[0]);
        m[1] = larger(low.second, m[1]);
        m[2] = larger(high.first, m[2]);
        m[3] = larger(high.second, m[3]);
    }
    return max_lanes(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

// Returns the last index of an element equal to `value`, which must exist.
template <class T>
inline int64_t find(Block<T> block, float value) {
    const Vec wanted = broadcast(value);
    IntVec where[2] = {IntVec{} - 1, IntVec{} - 1};
    for (int64_t i = 0; i < block.count; i += kPair) {
        const Pair x = load_pair(block.x + i);
        where[0] = x.first == wanted ? IntVec{} + int32_t(i) : where[0];
        where[1] = x.second == wanted ? IntVec{} + int32_t(i) : where[1];
    }
    int64_t last = -1;
    for (int vector = 0; vector < 2; ++vector) {
        int32_t pair[kWidth];
        store_bits(pair, where[vector]);
        for (int lane = 0; lane < kWidth; ++lane) {
            const int64_t index = pair[lane] + element_of(block.x, vector, lane);
            if (pair[lane] >= 0 && index > last) last = index;
        }
    }
    return last;
}

// Moves the sums to a new maximum: t grows by `shift` <= 0, e_v by the factor 2^shift.
inline void shift_sums(RowSums& sums, double shift) {
    const double scale = shift < -149 ? 0 : exp2(shift), total = sums.total();
    sums.rest = scale * total;
    sums.weighted = scale * (sums.weighted + total * shift);
    // terms without probability in fp32 count nothing, even if the reference is -inf
    sums.difference = scale == 0 ? 0 : scale * (sums.difference + total * shift);
}

// Moves the sums to the block's maximum if it is a new one; returns its index in the block, or -1.
template <class T>
inline int64_t raise_max(RowSums& sums, Block<T> block, float c) {
    const float m = block_max(block), max2 = m * c;
    if (!(max2 > sums.max2)) return -1;
    shift_sums(sums, double(sums.max2) - max2);
    sums.max2 = max2;
    sums.top = double(m) * c - max2;
    sums.largest = max2 < -kLowestMax ? exp2(sums.top) : __builtin_nan("");
    sums.weighted += sums.largest * sums.top;
    return find(block, m);
}

// The constants of all terms.
struct Centre {
    Vec c, max2, ref_max2;
    Power<5> power{1.0f};
};

template <SumKind kKind>
struct Lanes {
    Vec e = {}, weighted = {}, difference = {};

    // x: logits; y: the reference's, read with kReferenceSums alone
    void add(Vec x, Vec y, const Centre& centre) {
        Vec t = exact_multiply_subtract(x, centre.c, centre.max2), term;
        if (kKind == kReferenceSums) {
            t = clamp_exponent(t);
            term = scaled_exp2(t, centre.power);
            const Vec gap = t - exact_multiply_subtract(y, centre.c, centre.ref_max2);
            difference += term == 0.0f ? Vec{} : term * gap;
        } else {
            t = clamp_summand(t);
            term = exp2_summand(t, centre.power);
        }
        e += term;
        if (kKind != kLogpSums) weighted = multiply_add(term, t, weighted);
    }

    void add(const Lanes& other) {
        e += other.e;
        weighted += other.weighted;
        difference += other.difference;
    }
};

template <SumKind kKind, class T>
inline void add_step(Lanes<kKind> (&lanes)[4], const T* x, const T* y, const Centre& centre) {
    for (int half = 0; half < 2; ++half) {
        const Pair p = load_pair(x + half * kPair);
        const Pair q = kKind == kReferenceSums ? load_pair(y + half * kPair) : p;
        lanes[2 * half].add(p.first, q.first, centre);
        lanes[2 * half + 1].add(p.second, q.second, centre);
    }
}

// Adds a block to the sums, without the element `left_out` (-1: none). ahead: the memory of the next block, which is
// fetched while this one is summed.
template <SumKind kKind, class T>
inline void add_block(RowSums& sums, Block<T> block, const T* reference, float ref_max2, float c, int64_t left_out,
                      const char* ahead, int64_t ahead_bytes) {
    const Centre centre = {broadcast(c), broadcast(sums.max2), broadcast(ref_max2)};
    const T* y = kKind == kReferenceSums ? reference : block.x;
    Lanes<kKind> lanes[4];

    const auto add = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += kStep) {
            for (int64_t line = 0; line < ahead_bytes; line += 64) __builtin_prefetch(ahead + line);
            ahead += ahead_bytes;
            add_step(lanes, block.x + i, y + i, centre);
        }
    };
    if (left_out < 0) {
        add(0, block.count);
    } else {
        // the step with the maximum is taken from a copy with -inf in its place
        const int64_t step = left_out / kStep * kStep;
        T patched[kStep];
        std::memcpy(patched, block.x + step, sizeof(patched));
        patched[left_out - step] = negative_infinity(block.x);
        add(0, step);
        add_step(lanes, patched, y + step, centre);
        add(step + kStep, block.count);
    }
    lanes[0].add(lanes[1]);
    lanes[2].add(lanes[3]);
    lanes[0].add(lanes[2]);
    sums.rest += sum_lanes(lanes[0].e);
    if (kKind != kLogpSums) sums.weighted += sum_lanes(lanes[0].weighted);
    if (kKind == kReferenceSums) sums.difference += sum_lanes(lanes[0].difference);
}

inline double value_at(Block<float> block, int64_t index) { return block.x[index]; }

template <class T>
inline double value_at(Block<T> block, int64_t index) {
    return load_first(block.x + index, 1).first[0];
}

// Sums a row. take: block_of or capped_block_of. T: type in memory; S: type that is summed, float if capped.
template <SumKind kKind, class S, class T, class Take>
inline void sum_blocks(const T* logits, const T* reference, int64_t columns, Scaling scaling, RowSums& sums,
                       RowSums& ref_sums, Take take) {
    alignas(64) S buffer[kBlock];
    alignas(64) S ref_buffer[kKind == kReferenceSums ? kBlock : 1];
    constexpr int64_t kAheadBytes = kStep * sizeof(T);
    const auto ahead = [](const T* block) { return reinterpret_cast<const char*>(block + kBlock); };
    const float c = scaling.c;
    for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t count = columns - start < kBlock ? columns - start : kBlock;
        const Block<S> block = take(logits + start, count, scaling.cap, buffer);
        Block<S> other = {nullptr, 0};
        if (kKind == kReferenceSums) {
            other = take(reference + start, count, scaling.cap, ref_buffer);
            const double before = ref_sums.max2;
            const int64_t ref_top = raise_max(ref_sums, other, c);
            // t' grows by before - max2
            if (ref_top >= 0) sums.difference -= sums.total() * (before - ref_sums.max2);
            add_block<kLogpSums, S>(ref_sums, other, nullptr, 0.0f, c, ref_top, ahead(reference + start), kAheadBytes);
        }
        const int64_t top = raise_max(sums, block, c);
        if (kKind == kReferenceSums && top >= 0)
            sums.difference += sums.largest * (sums.top - (value_at(other, top) * c - ref_sums.max2));
        add_block<kKind>(sums, block, other.x, ref_sums.max2, c, top, ahead(logits + start), kAheadBytes);
    }
}

template <class T, bool kCapped, SumKind kKind>
void sum_row(const T* logits, const T* reference, int64_t columns, Scaling scaling, RowSums& sums, RowSums& ref_sums) {
    if constexpr (kCapped) {
        sum_blocks<kKind, float>(logits, reference, columns, scaling, sums, ref_sums, capped_block_of<T>);
    } else {
        sum_blocks<kKind, T>(logits, reference, columns, scaling, sums, ref_sums, block_of<T>);
    }
}

}  // namespace repo::REPO_ISA
