// The mathematics of one token, in float: repo_kernels/backends/eager/terms.py for one row.
#pragma once

#include <cstdint>

namespace repo {

// Rows of the values (9, N): VALUES of repo_kernels/backends/interface.py, where the names below are explained.
enum Value {
    kRewardAdvantage,
    kCostAdvantage,
    kCost,
    kCostLimit,
    kCostBaseline,
    kOldLogp,
    kRefLogp,
    kImportanceWeight,
    kWeight,
    kValues,
};

// SCALARS, in that order.
struct Scalars {
    float lam, beta, eps_low, eps_high, entropy_coef, temperature, grad_scale, dual_clip;
};

constexpr int kScalars = 8;

// TOKENS: rows of the token values (13, N).
enum Token {
    kLogp,
    kEntropy,
    kKl,
    kLive,
    kUnsafe,
    kClippedLowSafe,
    kClippedLowUnsafe,
    kClippedHighSafe,
    kClippedHighUnsafe,
    kRatio,
    kRatioSquare,
    kOldK1,
    kOldK3,
    kTokens,
};

enum CostCode { kNoCost, kCostGiven, kCostGated, kCostHinge };
enum KlCode { kNoKl, kK1, kK2, kK3, kFullKl };

struct Code {
    CostCode cost;
    KlCode kl;
    bool kl_importance_weighted, normalize, on_policy;

    static Code unpack(int64_t code);
};

// The inputs of one row: its values, the first part of its STATE, and whether its entropy is part of the loss.
struct TokenInputs {
    float value[kValues];
    float logp, entropy, kl;
    bool with_entropy;
};

// SLOPES, with grad_scale multiplied in.
struct Slopes {
    float logp, entropy, kl;
};

struct TokenTerms {
    float loss;
    Slopes slopes;
    float token[kTokens];
};

TokenTerms token_terms(const TokenInputs& in, const Scalars& scalars, const Code& code);

}  // namespace repo
