// The mathematics of one token, in float: repo_kernels/backends/eager/terms.py for one row.
#pragma once

#include "losses/arguments.h"

namespace repo {

// The first part of a row's STATE, and whether its entropy is part of the loss.
struct Probabilities {
    float logp, entropy, kl;
    bool with_entropy;
};

// SLOPES, with grad_scale multiplied in.
struct Slopes {
    float logp, entropy, kl;
};

struct TokenTerms {
    float row[kRows];
    int32_t flags;
    Slopes slopes;
};

// weight: the row's aggregation weight.
TokenTerms token_terms(const Arguments& arguments, Place place, float weight, const Probabilities& probabilities);

}  // namespace repo
