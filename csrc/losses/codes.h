// The names and codes of repo_kernels/backends/codes.py, where they are explained.
#pragma once

#include <cstdint>

namespace repo {

constexpr int64_t kIgnored = -100;

// SCALARS, in that order.
struct Scalars {
    float lam, beta, eps_low, eps_high, entropy_coef, temperature, grad_scale, dual_clip, cost_limit, divisor,
        max_length;
};

constexpr int kScalars = 11;
constexpr const char* kScalarNames[kScalars] = {"lam",         "beta",       "eps_low",   "eps_high",
                                                "entropy_coef", "temperature", "grad_scale", "dual_clip",
                                                "cost_limit",  "divisor",    "max_length"};

// ROWS: rows of the results (5, N).
enum Row { kLoss, kLogp, kEntropy, kKl, kLogRatio, kRows };

// Bits of a row's flags.
enum Flag { kLive = 1, kUnsafe = 2, kClippedLow = 4, kClippedHigh = 8 };

// STATS.
enum Stat {
    kEntropySum,
    kKlSum,
    kTokens,
    kTokensUnsafe,
    kClippedLowSafe,
    kClippedLowUnsafe,
    kClippedHighSafe,
    kClippedHighUnsafe,
    kRatioSum,
    kRatioSquareSum,
    kOldK1Sum,
    kOldK3Sum,
    kSequences,
    kSequencesUnsafe,
    kHingeSum,
    kPenaltySum,
    kRatioMin,
    kRatioMax,
    kStats,
};

// STATE: rows of the state (7, N).
enum State { kStateLogp, kStateEntropy, kStateKl, kMax2, kLog2Sum, kRefMax2, kRefLog2Sum, kStates };

enum CostCode { kNoCost, kCostGiven, kCostGated, kCostHinge };
enum KlCode { kNoKl, kK1, kK2, kK3, kFullKl };
enum Aggregation { kTokenMean, kTokenSum, kSeqTokenMean, kSeqTokenSum, kSeqTokenSumNorm, kNoAggregation };

struct Code {
    CostCode cost;
    KlCode kl;
    bool kl_importance_weighted, normalize, on_policy;
    Aggregation aggregation;
    bool divisor;

    static Code unpack(int64_t code) {
        return {CostCode(code & 3),  KlCode(code >> 2 & 7),        bool(code >> 5 & 1), bool(code >> 6 & 1),
                bool(code >> 7 & 1), Aggregation(code >> 8 & 7), bool(code >> 11 & 1)};
    }
};

}  // namespace repo
