// Causal attention over packed rows in fp32: a segment of queries sees the keys of that segment, aligned at their ends.
#pragma once

#include <cstdint>

#include "kernels/attention_task.h"

namespace repo {

// All segments and heads. query_bounds, key_bounds: (segments + 1,). `of`: the task of the first segment and key head.
struct AttentionBatch {
    AttentionTask of;
    int64_t segments, key_heads;
    const int32_t *query_bounds, *key_bounds;
};

// Writes out and log2_sums.
void attention(const AttentionBatch& batch, int threads);

// Writes dq, dk and dv.
void attention_gradient(const AttentionBatch& batch, int threads);

}  // namespace repo
