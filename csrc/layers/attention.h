// Causal attention over packed rows in fp32: each segment of queries sees its own keys, aligned at their ends.
#pragma once

#include <cstdint>

#include "kernels/attention_task.h"

namespace repo {

// All segments: bounds (segments + 1,) of their queries and keys; `of` is the task of the first one, of all heads.
struct AttentionBatch {
    AttentionTask of;
    int64_t segments, key_heads;
    const int32_t *query_bounds, *key_bounds;
};

void attention(const AttentionBatch& batch, int threads);

void attention_gradient(const AttentionBatch& batch, int threads);

}  // namespace repo
