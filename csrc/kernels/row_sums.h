// The first pass over a row, in blocks that stay in L1: each is searched for its maximum while the one before it is
// summed, and then summed itself.
#pragma once

#include "kernels/convert.h"
#include "kernels/exponential.h"
#include "kernels/kept_row.h"
#include "kernels/row_blocks.h"
#include "kernels/row_kernels.h"

namespace repo::REPO_ISA {

constexpr int64_t kAhead = 16 << 10;  // bytes between the block that is summed and what is fetched into L2

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

// Sums in every lane of a vector. In a block with a new maximum (kRaised) the terms of the maximum are counted and not
// summed; ref is the sum of the reference's logits there.
template <Terms kTerms, bool kRaised>
struct Lanes {
    Vec rest = {}, weighted = {}, difference = {}, ref = {};
    IntVec maxima = {};

    void add(const Term& term, Vec x, Vec y, const Centre& centre) {
        weighted += term.weighted;
        if (kRaised) {
            const IntVec is_max = x == broadcast(centre.max);
            rest += is_max ? Vec{} : term.e;
            difference += is_max ? Vec{} : term.difference;
            maxima -= is_max;
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

// Memory that is fetched into L2 while a block is summed, `step` bytes further with each step.
struct Ahead {
    const char* from;
    int64_t step;
};

// Adds the terms of a block to the sums and stores them. Meanwhile it searches the next block, whose largest logit it
// returns.
template <Terms kTerms, bool kRaised, class S, class Kept>
float add_terms(RowSums& sums, Block<S> block, const S* reference, Centre centre, const Kept& kept, Block<S> next,
                Ahead ahead) {
    const TermsOf<kTerms> terms(centre);
    Lanes<kTerms, kRaised> lanes[4];
    Largest<S> largest;
    for (int64_t step = 0; step < block.count; step += kStep, ahead.from += ahead.step) {
        for (int line = 0; line < int(kStep * sizeof(S)); line += 64) __builtin_prefetch(ahead.from + line, 0, 2);
        if (step < next.count) largest.add(next.x + step);
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
    return largest.get();
}

// A row whose blocks are summed one after another.
template <class T, bool kCapped>
class SummedRow {
   public:
    using S = typename Blocks<T, kCapped>::S;

    SummedRow(const T* row, int64_t columns, Scaling scaling, RowSums& sums)
        : sums(sums),
          row(row),
          c(scaling.c),
          blocks(row, columns, scaling.cap),
          block(blocks.get(0)),
          max(block_max(block)) {}

    // The logits of the next block.
    const S* logits() const { return block.x; }

    // Adds the next block to the sums: first its maximum, then its terms, given the logits of the reference.
    template <Terms kTerms, class Kept>
    void add_block(const S* reference, float ref_max2, const Kept& kept) {
        const Ahead ahead = {reinterpret_cast<const char*>(row + number * kBlock) + kAhead, kStep * sizeof(T)};
        const Block<S> next = blocks.get(++number);
        const bool raised = raise_max(sums, max, c);
        const auto add = raised ? add_terms<kTerms, true, S, Kept> : add_terms<kTerms, false, S, Kept>;
        max = add(sums, block, reference, {c, sums.max2, ref_max2, max}, kept, next, ahead);
        block = next;
    }

   private:
    RowSums& sums;
    const T* row;
    float c;
    Blocks<T, kCapped> blocks;
    int64_t number = 0;
    Block<S> block;
    float max;  // of the block
};

template <class T, bool kCapped, Terms kTerms>
void sum_row(const T* logits, const T* reference, int64_t columns, Scaling scaling, const KeptRow& kept, RowSums& sums,
             RowSums& ref_sums) {
    alignas(64) float scratch[kBlock];  // takes the terms if they are not kept
    SummedRow<T, kCapped> row(logits, columns, scaling, sums);
    SummedRow<T, kCapped> ref(reference, with_kl(kTerms) ? columns : 0, scaling, ref_sums);
    for (int64_t number = 0; number * kBlock < columns; ++number) {
        const auto* other = ref.logits();
        if (with_kl(kTerms)) {
            const double before = ref_sums.max2;
            ref.template add_block<kPlainTerms>(nullptr, 0, Nowhere());
            sums.difference -= sums.total() * (before - ref_sums.max2);  // t' has grown by so much
        }
        const KeptTerms<kTerms> terms = kept.e ? KeptTerms<kTerms>(kept, number * kBlock, logits)
                                               : KeptTerms<kTerms>({scratch, scratch, scratch}, 0, scratch);
        row.template add_block<kTerms>(other, ref_sums.max2, terms);
        if (kept.e) kept.max2[number] = sums.max2, kept.ref_max2[number] = ref_sums.max2;
    }
}

}  // namespace repo::REPO_ISA
