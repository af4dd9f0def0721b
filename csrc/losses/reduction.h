// Sums over the rows of a loss, in the order of the rows.
#pragma once

#include <vector>

#include "losses/arguments.h"

namespace repo {

// The aggregation weights of the rows: repo_kernels/backends/eager/dense.py, token_weights.
class Weights {
public:
    explicit Weights(const Arguments& arguments);

    float of(Place place) const { return 1 / (by_sequence_.empty() ? total_ : by_sequence_[place.sequence]); }

private:
    float total_ = 1;
    std::vector<float> by_sequence_;  // of the mean over the tokens of a sequence
};

// Sums up rows (kRows, N) and flags (N,) into the loss and stats (kStats,).
void reduce(const Arguments& arguments, const float* rows, const int32_t* flags, float* loss, float* stats);

}  // namespace repo
