#include "layers/attention.h"

#include <algorithm>
#include <vector>

#include "kernels/dispatch.h"
#include "common/parallel.h"

namespace repo {
namespace {

template <class T>
TokenHeads<T> moved(const TokenHeads<T>& all, int64_t token, int64_t head) {
    return {all.data ? all.row(token, head) : nullptr, all.by_token, all.by_head};
}

AttentionTask task_of(const AttentionBatch& batch, int64_t segment, int64_t head) {
    AttentionTask task = batch.of;
    const int64_t query = batch.query_bounds[segment], key = batch.key_bounds[segment];
    const int64_t first = head * task.heads;
    task.queries = batch.query_bounds[segment + 1] - query;
    task.keys = batch.key_bounds[segment + 1] - key;
    task.q = moved(task.q, query, first), task.dq = moved(task.dq, query, first);
    task.out = moved(task.out, query, first), task.dout = moved(task.dout, query, first);
    task.k = moved(task.k, key, head), task.dk = moved(task.dk, key, head);
    task.v = moved(task.v, key, head), task.dv = moved(task.dv, key, head);
    task.log2_sums += first * task.tokens + query;
    return task;
}

// Returns the floats that a task needs: a segment's keys and values, transposed, a block of scores and their gradients.
int64_t scratch_size(const AttentionBatch& batch) {
    int64_t longest = 0;
    for (int64_t s = 0; s < batch.segments; ++s)
        longest = std::max<int64_t>(longest, batch.key_bounds[s + 1] - batch.key_bounds[s]);
    const int64_t width = (longest + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
    return 2 * width * (batch.of.columns + kQueryBlock);
}

void over_tasks(const AttentionBatch& batch, int threads, void (*kernel)(const AttentionTask&, float*)) {
    const int64_t size = scratch_size(batch), tasks = batch.segments * batch.key_heads;
    const auto range = [&](int64_t first, int64_t last) {
        std::vector<float> scratch(size);
        for (int64_t i = first; i < last; ++i)
            kernel(task_of(batch, i / batch.key_heads, i % batch.key_heads), scratch.data());
    };
    const int64_t busy = int64_t(batch.key_bounds[batch.segments]) * batch.key_heads * batch.of.columns * 16;
    parallel_rows(tasks, kElementsPerTurn, busy, threads, range, [] {});
}

}  // namespace

void attention(const AttentionBatch& batch, int threads) { over_tasks(batch, threads, kernels().attend); }

void attention_gradient(const AttentionBatch& batch, int threads) {
    over_tasks(batch, threads, kernels().attend_gradient);
}

}  // namespace repo
