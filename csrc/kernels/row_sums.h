// The first pass over a row, in blocks that stay in L1: each is searched for a new maximum and then summed.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/kept_row.h"
#include "kernels/row_kernels.h"

extern "C" double exp2(double);

namespace repo::REPO_ISA {

constexpr int kStep = 2 * kPair;  // elements
constexpr int64_t kAhead = 16 << 10;  // bytes from where a row is summed to where it is fetched into L2

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

// Returns the bits of 16-bit floats as integers of the same order, or such integers as bits. NaN may be the largest.
template <class V>
inline V in_order(V bits) {
    return bits ^ ((bits >> 15) & int16_t(0x7fff));
}

// The largest of logits, a step at a time, in every lane. 16-bit types are compared as integers.
template <class T>
struct Largest {
    ShortVec lanes[2] = {ShortVec{} + int16_t(INT16_MIN), ShortVec{} + int16_t(INT16_MIN)};

    void add(const T* step) {
        for (int i = 0; i < 2; ++i) lanes[i] = larger(in_order(load_bits<ShortVec>(step + i * kPair)), lanes[i]);
    }

    float get() const {
        const T x = {uint16_t(in_order(max_lanes(larger(lanes[0], lanes[1]))))};
        return load_first(&x, 1).first[0];
    }
};

template <>
struct Largest<float> {
    Vec lanes[4] = {broadcast(-__builtin_inff()), broadcast(-__builtin_inff()), broadcast(-__builtin_inff()),
                    broadcast(-__builtin_inff())};

    void add(const float* step) {
        for (int i = 0; i < 4; ++i) lanes[i] = larger(load_bits<Vec>(step + i * kWidth), lanes[i]);
    }

    float get() const { return max_lanes(larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]))); }
};

// Returns the largest logit of a block. The first and the last step are unaligned, and overlap with those between.
template <class T>
inline float block_max(Block<T> block) {
    const T *first = block.x, *last = first + block.count - kStep;
    Largest<T> largest;
    largest.add(first);
    for (const T* step = first + to_line(first); step < last; step += kStep) largest.add(step);
    largest.add(last);
    return largest.get();
}

// Moves the sums to a new maximum: t grows by `shift` <= 0, e_v by the factor 2^shift.
inline void shift_sums(RowSums& sums, double shift) {
    const double scale = shift < -149 ? 0 : exp2(shift), total = sums.total();
    sums.rest = scale * total;
    sums.largest = 0;
    sums.weighted = scale * (sums.weighted + total * shift);
    // terms without probability in fp32 count nothing, even if the reference is -inf
    sums.difference = scale == 0 ? 0 : scale * (sums.difference + total * shift);
}

// Moves the sums to the maximum of a block if it is a new one; returns whether it is.
inline bool raise_max(RowSums& sums, float max, float c) {
    const float max2 = max * c;
    if (!(max2 > sums.max2)) return false;
    shift_sums(sums, double(sums.max2) - max2);
    sums.max2 = max2;
    sums.top = double(max) * c - max2;
    return true;
}

// The constants of all terms. max: the block's largest logit if it is a new maximum.
struct Centre {
    Vec c, max2, ref_max2, max;
    Power<5> power{1.0f};
};

constexpr bool sums_entropy(SumKind kind) { return kind == kEntropySums || kind == kAllSums; }
constexpr bool sums_kl(SumKind kind) { return kind == kReferenceSums || kind == kAllSums; }

// Sums in every lane of a vector. maxima: how many terms are of the maximum, which are not in `rest`.
template <SumKind kKind, bool kRaised>
struct Lanes {
    Vec rest = {}, maxima = {}, weighted = {}, difference = {};

    // Adds the terms of logits x and, for the KL, of the reference's y; returns e_v.
    Vec add(Vec x, Vec y, const Centre& centre) {
        const Vec t = exact_multiply_subtract(x, centre.c, centre.max2), e = scaled_exp2(t, centre.power);
        if (kRaised) {
            const IntVec is_max = x == centre.max;
            maxima += is_max ? broadcast(1) : Vec{};
            rest += is_max ? Vec{} : e;
        } else {
            rest += e;
        }
        if (sums_entropy(kKind)) weighted = multiply_add(e, clamp_exponent(t), weighted);
        if (sums_kl(kKind)) {
            const Vec gap = t - exact_multiply_subtract(y, centre.c, centre.ref_max2);
            difference = multiply_add(e, e == 0.0f ? Vec{} : gap, difference);
        }
        return e;
    }

    void add(const Lanes& other) {
        rest += other.rest;
        maxima += other.maxima;
        weighted += other.weighted;
        difference += other.difference;
    }

    void add_to(RowSums& sums) const {
        sums.rest += sum_lanes(rest);
        if (kRaised) sums.largest = sum_lanes(maxima) * (sums.max2 < -kLowestMax ? exp2(sums.top) : __builtin_nan(""));
        if (sums_entropy(kKind)) sums.weighted += sum_lanes(weighted);
        if (sums_kl(kKind)) sums.difference += sum_lanes(difference);
    }
};

// Where the exponentials of a reference go.
struct Nowhere {
    Nowhere from_pair(int64_t) const { return {}; }
    void store(Pair) const {}
};

// Adds a block to the sums, and stores its exponentials. ahead: memory to fetch, kFetch bytes for each step.
template <SumKind kKind, bool kRaised, int kFetch, class S, class Kept>
inline void add_terms(RowSums& sums, Block<S> block, float max, const S* reference, float ref_max2, float c, Kept kept,
                      const char* ahead) {
    const Centre centre = {broadcast(c), broadcast(sums.max2), broadcast(ref_max2), broadcast(max)};
    Lanes<kKind, kRaised> lanes[4];
    for (int64_t step = 0; step < block.count; step += kStep, ahead += kFetch) {
        for (int line = 0; line < kFetch; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        for (int half = 0; half < 2; ++half) {
            const int64_t i = step + half * kPair;
            const Pair x = load_pair(block.x + i), y = sums_kl(kKind) ? load_pair(reference + i) : x;
            kept.from_pair(i / kPair).store({lanes[2 * half].add(x.first, y.first, centre),
                                             lanes[2 * half + 1].add(x.second, y.second, centre)});
        }
    }
    lanes[0].add(lanes[1]);
    lanes[2].add(lanes[3]);
    lanes[0].add(lanes[2]);
    lanes[0].add_to(sums);
}

template <SumKind kKind, int kFetch, class S, class Kept>
inline void add_block(RowSums& sums, Block<S> block, float max, bool raised, const S* reference, float ref_max2, float c, Kept kept,
                      const char* ahead) {
    const auto add = raised ? add_terms<kKind, true, kFetch, S, Kept> : add_terms<kKind, false, kFetch, S, Kept>;
    add(sums, block, max, reference, ref_max2, c, kept, ahead);
}

// Sums a row. take: block_of or capped_block_of. T: type in memory; S: type that is summed, float if capped.
template <SumKind kKind, class S, class T, class Take>
inline void sum_blocks(const T* logits, const T* reference, int64_t columns, Scaling scaling, const KeptRow& kept,
                       RowSums& sums, RowSums& ref_sums, Take take) {
    alignas(64) S buffer[kBlock];
    alignas(64) S ref_buffer[sums_kl(kKind) ? kBlock : 1];
    alignas(64) float unkept[kBlock];
    constexpr int kFetch = kStep * sizeof(T);
    const auto ahead = [](const T* block) { return reinterpret_cast<const char*>(block) + kAhead; };
    const float c = scaling.c;
    for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t count = columns - start < kBlock ? columns - start : kBlock;
        const Block<S> block = take(logits + start, count, scaling.cap, buffer);
        Block<S> other = {nullptr, 0};
        if (sums_kl(kKind)) {
            other = take(reference + start, count, scaling.cap, ref_buffer);
            const double before = ref_sums.max2;
            const float max = block_max(other);
            const bool raised = raise_max(ref_sums, max, c);
            // t' grows by before - max2
            if (raised) sums.difference -= sums.total() * (before - ref_sums.max2);
            add_block<kLogpSums, kFetch, S>(ref_sums, other, max, raised, nullptr, 0.0f, c, Nowhere(), ahead(reference + start));
        }
        const float max = block_max(block);
        const bool raised = raise_max(sums, max, c);
        if (kept.exponentials) kept.max2[start / kBlock] = sums.max2;
        const KeptPairs to = kept.exponentials ? kept_from(kept, start, logits) : KeptPairs{unkept, unkept + kWidth, kPair};
        add_block<kKind, kFetch>(sums, block, max, raised, other.x, ref_sums.max2, c, to, ahead(logits + start));
    }
}

template <class T, bool kCapped, SumKind kKind>
void sum_row(const T* logits, const T* reference, int64_t columns, Scaling scaling, const KeptRow& kept, RowSums& sums,
             RowSums& ref_sums) {
    if constexpr (kCapped) {
        sum_blocks<kKind, float>(logits, reference, columns, scaling, kept, sums, ref_sums, capped_block_of<T>);
    } else {
        sum_blocks<kKind, T>(logits, reference, columns, scaling, kept, sums, ref_sums, block_of<T>);
    }
}

}  // namespace repo::REPO_ISA
