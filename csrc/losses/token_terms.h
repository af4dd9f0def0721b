// The per-token mathematics: repo_kernels/terms.py for one row, in float as there.
#pragma once

#include <cstdint>

namespace repo {

// repo_kernels/rows.py: VALUES, rows of a (9, N) matrix.
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

// SCALARS, in their order there.
struct Scalars {
    float lam, beta, eps_low, eps_high, entropy_coef, temperature, grad_scale, dual_clip;
};

constexpr int kScalars = 8;

// TOKENS, rows of a (13, N) matrix.
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

// What is known of the row: its STATE, and whether its entropy is part of the loss.
struct TokenInputs {
    float value[kValues];
    float logp, entropy, kl;
    bool with_entropy;
};

// SLOPES; grad_scale is multiplied in.
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
