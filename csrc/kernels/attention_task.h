// The work of one call of an attention kernel: one segment of queries and keys, one key head.
#pragma once

#include <cstdint>

namespace repo {

constexpr int64_t kQueryBlock = 32;      // queries whose scores are held at once
constexpr int64_t kColumnMultiple = 16;  // a head has a multiple of so many columns: whole vectors

// (tokens, heads, columns) with consecutive columns; strides in elements.
template <class T>
struct TokenHeads {
    T* data;
    int64_t by_token, by_head;

    T* row(int64_t token, int64_t head) const { return data + token * by_token + head * by_head; }
};

// One segment, one key head and the query heads that share it; the pointers stand at their first elements. A query does
// not see keys that are `window` or more before it. log2_sums: (heads, tokens), base-2 logarithms of the softmax
// denominators, which the forward writes and the gradient reads. The gradient writes dq, dk and dv.
struct AttentionTask {
    int64_t queries, keys, heads, columns, tokens, window;
    float scale;
    TokenHeads<const float> q, k, v, dout;
    TokenHeads<float> out, dq, dk, dv;
    float* log2_sums;
};

}  // namespace repo
