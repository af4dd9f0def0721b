// The first pass over a row, in blocks that stay in L1: each is searched for a new maximum and then summed.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/kept_row.h"
#include "kernels/row_kernels.h"

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
    const double scale = exp2_or_zero(shift), total = sums.total();
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

// What the terms of a block are relative to. max: the block's largest logit.
struct Centre {
    float c, max2, ref_max2, max;
};

// Sums in every lane of a vector. If the block has a new maximum (kRaised), its terms are counted and not summed; ref is
// the sum of the reference's logits there.
template <Terms kTerms, bool kRaised>
struct Lanes {
    Vec rest = {}, weighted = {}, difference = {}, maxima = {}, ref = {};

    void add(const Term& term, Vec x, Vec y, const Centre& centre) {
        weighted += term.weighted;
        if (kRaised) {
            const IntVec is_max = x == broadcast(centre.max);
            rest += is_max ? Vec{} : term.e;
            difference += is_max ? Vec{} : term.difference;
            maxima += is_max ? broadcast(1) : Vec{};
            ref += is_max ? y : Vec{};
        } else {
            rest += term.e;
            difference += term.difference;
        }
    }

    void add(const Lanes& other) {
        rest += other.rest;
        weighted += other.weighted;
        difference += other.difference;
        maxima += other.maxima;
        ref += other.ref;
    }

    void add_to(RowSums& sums, const Centre& centre) const {
        sums.rest += sum_lanes(rest);
        if (with_entropy(kTerms)) sums.weighted += sum_lanes(weighted);
        if (with_kl(kTerms)) sums.difference += sum_lanes(difference);
        if (!kRaised) return;
        const double count = sum_lanes(maxima), e = sums.max2 < -kLowestMax ? exp2(sums.top) : __builtin_nan("");
        sums.largest = e;
        sums.rest += (count - 1) * e;
        // in double: with a probability near 1 it decides all digits of the KL
        if (with_kl(kTerms))
            sums.difference += e * (count * (sums.top + centre.ref_max2) - double(centre.c) * sum_lanes(ref));
    }
};

// Computes terms of logits, given those of the reference.
template <Terms kTerms>
struct TermsOf {
    Vec c, max2, ref_max2;
    Power<5> power{1.0f};

    explicit TermsOf(const Centre& centre)
        : c(broadcast(centre.c)), max2(broadcast(centre.max2)), ref_max2(broadcast(centre.ref_max2)) {}

    Term operator()(Vec x, Vec y) const {
        const Vec t = exact_multiply_subtract(x, c, max2);
        Term term = {scaled_exp2(t, power), {}, {}};
        if (with_entropy(kTerms)) term.weighted = term.e * clamp_exponent(t);
        if (with_kl(kTerms)) {
            const Vec gap = t - exact_multiply_subtract(y, c, ref_max2);
            term.difference = term.e == 0.0f ? Vec{} : term.e * gap;
        }
        return term;
    }
};

// Where terms go that nobody needs again.
struct Nowhere {
    void store(int64_t, const Term&, const Term&) const {}
};

// Adds the terms of a block to the sums and stores them. ahead: memory that is fetched, kFetch bytes with each step.
template <Terms kTerms, bool kRaised, int kFetch, class S, class Kept>
void add_terms(RowSums& sums, Block<S> block, const S* reference, Centre centre, const Kept& kept, const char* ahead) {
    const TermsOf<kTerms> terms(centre);
    Lanes<kTerms, kRaised> lanes[4];
    for (int64_t step = 0; step < block.count; step += kStep, ahead += kFetch) {
        for (int line = 0; line < kFetch; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        for (int half = 0; half < 2; ++half) {
            const int64_t i = step + half * kPair;
            const Pair x = load_pair(block.x + i), y = with_kl(kTerms) ? load_pair(reference + i) : x;
            const Term first = terms(x.first, y.first), second = terms(x.second, y.second);
            kept.store(i / kPair, first, second);
            lanes[2 * half].add(first, x.first, y.first, centre);
            lanes[2 * half + 1].add(second, x.second, y.second, centre);
        }
    }
    lanes[0].add(lanes[1]);
    lanes[2].add(lanes[3]);
    lanes[0].add(lanes[2]);
    lanes[0].add_to(sums, centre);
}

// Adds a block to the sums: first its maximum, then its terms.
template <Terms kTerms, int kFetch, class S, class Kept>
inline void sum_block(RowSums& sums, Block<S> block, const S* reference, float ref_max2, float c, const Kept& kept,
                      const char* ahead) {
    const float max = block_max(block);
    const bool raised = raise_max(sums, max, c);
    const auto add = raised ? add_terms<kTerms, true, kFetch, S, Kept> : add_terms<kTerms, false, kFetch, S, Kept>;
    add(sums, block, reference, {c, sums.max2, ref_max2, max}, kept, ahead);
}

// Sums a row. take: block_of or capped_block_of. T: type in memory; S: type that is summed, float if capped.
template <Terms kTerms, class S, class T, class Take>
inline void sum_blocks(const T* logits, const T* reference, int64_t columns, Scaling scaling, const KeptRow& kept,
                       RowSums& sums, RowSums& ref_sums, Take take) {
    alignas(64) S buffer[kBlock];
    alignas(64) S ref_buffer[with_kl(kTerms) ? kBlock : 1];
    alignas(64) float scratch[kBlock];  // takes the terms if they are not kept
    constexpr int kFetch = kStep * sizeof(T);
    const auto ahead = [](const T* block) { return reinterpret_cast<const char*>(block) + kAhead; };
    for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t count = least(columns - start, kBlock), number = start / kBlock;
        const Block<S> block = take(logits + start, count, scaling.cap, buffer);
        Block<S> other = {nullptr, 0};
        if (with_kl(kTerms)) {
            other = take(reference + start, count, scaling.cap, ref_buffer);
            const double before = ref_sums.max2;
            sum_block<kPlainTerms, kFetch, S>(ref_sums, other, nullptr, 0, scaling.c, Nowhere(), ahead(reference + start));
            sums.difference -= sums.total() * (before - ref_sums.max2);  // t' has grown by so much
        }
        const KeptTerms<kTerms> terms = kept.e ? KeptTerms<kTerms>(kept, start, logits)
                                               : KeptTerms<kTerms>({scratch, scratch, scratch}, 0, scratch);
        sum_block<kTerms, kFetch>(sums, block, other.x, ref_sums.max2, scaling.c, terms, ahead(logits + start));
        if (kept.e) kept.max2[number] = sums.max2, kept.ref_max2[number] = ref_sums.max2;
    }
}

template <class T, bool kCapped, Terms kTerms>
void sum_row(const T* logits, const T* reference, int64_t columns, Scaling scaling, const KeptRow& kept, RowSums& sums,
             RowSums& ref_sums) {
    if constexpr (kCapped) {
        sum_blocks<kTerms, float>(logits, reference, columns, scaling, kept, sums, ref_sums, capped_block_of<T>);
    } else {
        sum_blocks<kTerms, T>(logits, reference, columns, scaling, kept, sums, ref_sums, block_of<T>);
    }
}

}  // namespace repo::REPO_ISA
