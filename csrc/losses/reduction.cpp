#include "losses/reduction.h"

#include <cmath>

namespace repo {
namespace {

// Returns the larger one, or NaN if either is NaN.
float larger(float a, float b) { return a > b || a != a ? a : b; }

int64_t count_live(const Arguments& of, int64_t sequence) {
    int64_t live = 0;
    for (int64_t row = of.begin(sequence); row < of.end(sequence); ++row) live += of.live(of.place(row, sequence));
    return live;
}

}  // namespace

Weights::Weights(const Arguments& of) {
    const Aggregation aggregation = of.code.aggregation;
    if (aggregation == kTokenSum || aggregation == kNoAggregation) return;
    const bool by_sequence = aggregation == kSeqTokenMean;
    if (by_sequence) by_sequence_.resize(of.sequences);
    int64_t outer = 0;
    if (by_sequence || !of.code.divisor) {
        for (int64_t s = 0; s < of.sequences; ++s) {
            const int64_t live = count_live(of, s);
            outer += aggregation == kTokenMean ? live : live > 0;
            if (by_sequence) by_sequence_[s] = float(std::max<int64_t>(live, 1));
        }
    }
    total_ = of.code.divisor ? of.scalars.divisor : float(std::max<int64_t>(outer, 1));
    if (aggregation == kSeqTokenSumNorm) total_ = of.scalars.max_length * total_;
    for (float& count : by_sequence_) count *= total_;
}

void reduce(const Arguments& of, const float* rows, const int32_t* flags, float* loss, float* stats) {
    const auto at = [&](int name, int64_t row) { return rows[name * of.count + row]; };
    double sums[kStats] = {}, total = 0;
    float low = INFINITY, high = -INFINITY;
    for (int64_t s = 0; s < of.sequences; ++s) {
        bool live = false;
        float hinge = 0;
        for (int64_t row = of.begin(s); row < of.end(s); ++row) {
            const int32_t bits = flags[row];
            if (!bits) continue;
            live = true;
            hinge = larger(of.hinge(of.place(row, s)), hinge);
            const float log_ratio = at(kLogRatio, row), ratio = std::exp(log_ratio);
            const bool unsafe = bits & kUnsafe;
            total += at(kLoss, row);
            sums[kEntropySum] += at(kEntropy, row);
            sums[kKlSum] += at(kKl, row);
            sums[kTokens] += 1;
            sums[kTokensUnsafe] += unsafe;
            sums[unsafe ? kClippedLowUnsafe : kClippedLowSafe] += bool(bits & kClippedLow);
            sums[unsafe ? kClippedHighUnsafe : kClippedHighSafe] += bool(bits & kClippedHigh);
            sums[kRatioSum] += ratio;
            sums[kRatioSquareSum] += ratio * ratio;
            sums[kOldK1Sum] -= log_ratio;
            sums[kOldK3Sum] += std::expm1(log_ratio) - log_ratio;
            low = -larger(-ratio, -low);
            high = larger(ratio, high);
        }
        sums[kSequences] += live;
        sums[kSequencesUnsafe] += hinge > 0;
        sums[kHingeSum] += hinge;
    }
    sums[kPenaltySum] = double(of.scalars.lam) * float(sums[kHingeSum]);
    sums[kRatioMin] = sums[kTokens] > 0 ? low : 1;
    sums[kRatioMax] = sums[kTokens] > 0 ? high : 1;
    *loss = float(total);
    for (int i = 0; i < kStats; ++i) stats[i] = float(sums[i]);
}

}  // namespace repo
