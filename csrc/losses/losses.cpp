#include "losses/losses.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/dispatch.h"
#include "common/parallel.h"
#include "losses/reduction.h"
#include "losses/token_terms.h"

namespace repo {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The STATE of one row, before it is rounded to float.
struct RowState {
    double logp = 0, entropy = 0, kl = 0;
    float max2 = 0;
    double log2_sum = 0;
    float ref_max2 = 0;
    double ref_log2_sum = 0;
};

bool is_usable(float temperature) { return temperature > 0 && std::isnormal(temperature); }

// What one row does to its logits: the cap and the temperature. One that is not positive and finite becomes NaN, and so
// does all that follows from it.
struct Transform {
    float temperature;
    Scaling scaling;

    Transform(float given, float softcap)
        : temperature(given > 0 && std::isfinite(given) ? given : std::numeric_limits<float>::quiet_NaN()),
          scaling{float(kLog2E / temperature), softcap} {}
};

// Returns log2 of the row's sum; NaN if no logit was above the lowest maximum, as in a row of -inf.
double log2_total(const RowSums& sums) {
    if (!(sums.largest > 0)) return std::numeric_limits<double>::quiet_NaN();
    return sums.top + std::log1p(sums.rest / sums.largest) * kLog2E;
}

// Returns this thread's memory for the terms of a row; none where no gradient follows, or where the row is so long that
// its terms leave the caches and are computed again in the same time.
KeptRow kept_row(const Tensors& tensors, bool with_entropy) {
    constexpr int64_t kLongest = 1 << 18;
    struct alignas(64) Line {
        float value[16];
    };
    thread_local std::vector<Line> lines;
    const int64_t columns = tensors.logits.columns, plane = kept_plane(columns), blocks = kept_blocks(columns);
    if (!tensors.grad || columns > kLongest) return {};
    const int64_t needed = (2 * plane * (1 + with_entropy + (tensors.reference != nullptr)) + 2 * blocks + 15) / 16;
    if (int64_t(lines.size()) < needed) lines.resize(needed);
    float* next = lines.front().value;
    const auto take = [&](int64_t count, bool wanted) { return wanted ? std::exchange(next, next + count) : nullptr; };
    float *e = take(2 * plane, true), *weighted = take(2 * plane, with_entropy);
    float* difference = take(2 * plane, tensors.reference);
    return {e, weighted, difference, take(blocks, true), take(blocks, true), plane};
}

RowState find_state(const RowKernels& kernels, const Tensors& tensors, int64_t r, int64_t id, Scaling scaling,
                    bool with_entropy, const KeptRow& kept) {
    const Rows& logits = tensors.logits;
    const void* row = logits.row(r);
    const void* reference = tensors.reference ? tensors.reference->row(r) : nullptr;
    RowSums sums, ref_sums;
    const auto sum_row = kernels.statistics[logits.dtype][terms_of(with_entropy, reference)];
    sum_row(row, reference, logits.columns, scaling, kept, sums, ref_sums);

    const double log2_sum = log2_total(sums), total = sums.total();
    float slope;
    const double t = double(kernels.logit[logits.dtype](row, id, scaling, &slope)) * scaling.c - sums.max2;
    RowState state;
    // t - top is exactly 0 at the maximum, and log1p keeps the rest, so that the digits of 1 - p survive where p -> 1
    state.logp = (t - sums.top - (log2_sum - sums.top)) * kLn2;
    state.max2 = sums.max2;
    state.log2_sum = log2_sum;
    // H = -sum p log p, exactly 0 where one entry has all the probability
    if (with_entropy) state.entropy = (log2_sum - (sums.rest == 0 ? sums.top : sums.weighted / total)) * kLn2;
    if (reference) {
        const double ref_log2_sum = log2_total(ref_sums);
        state.ref_max2 = ref_sums.max2;
        state.ref_log2_sum = ref_log2_sum;
        // sum p (log p - log q)
        state.kl = (sums.difference / total - (log2_sum - ref_log2_sum)) * kLn2;
    }
    return state;
}

// Computes dL/dz_y, before the row is written over; 1 - p_y = -expm1(log p_y) does not cancel where p_y -> 1.
float target_gradient(const RowKernels& kernels, const Tensors& tensors, int64_t r, int64_t id, const RowState& state,
                      const Slopes& slopes, const Transform& transform) {
    const Scaling scaling = transform.scaling;
    float slope, ref_slope;
    const DType dtype = tensors.logits.dtype;
    kernels.logit[dtype](tensors.logits.row(r), id, scaling, &slope);
    const double logp = state.logp, p = std::exp(logp);
    double grad = slopes.logp * -std::expm1(logp);
    if (slopes.entropy != 0 && p != 0) grad -= slopes.entropy * p * (logp + state.entropy);
    if (slopes.kl != 0 && p != 0 && tensors.reference) {
        const double z = kernels.logit[dtype](tensors.reference->row(r), id, scaling, &ref_slope);
        const double logq = (z * scaling.c - state.ref_max2 - state.ref_log2_sum) * kLn2;
        grad += slopes.kl * p * (logp - logq - state.kl);
    }
    return float(grad / transform.temperature * slope);
}

// Writes p_v (-g_logp - g_H (log p_v + H) + g_kl (log p_v - log q_v - KL)) / temperature in terms of
// e_v = p_v 2^log2_sum and t_v = log2 p_v + log2_sum.
GradientWeights gradient_weights(const RowState& state, const Slopes& slopes, float temperature, bool with_reference) {
    const double scale = std::exp2(-state.log2_sum) / temperature;
    double base = -double(slopes.logp);
    if (slopes.entropy != 0) base -= slopes.entropy * (state.entropy - state.log2_sum * kLn2);
    GradientWeights weights = {state.max2, state.ref_max2, 0, float(-scale * slopes.entropy * kLn2), 0};
    if (with_reference) {
        base -= slopes.kl * ((state.log2_sum - state.ref_log2_sum) * kLn2 + state.kl);
        weights.by_difference = float(scale * slopes.kl * kLn2);
    }
    weights.base = float(scale * base);
    // a NaN with a payload could overflow in the rounding to bfloat16
    for (float* weight : {&weights.base, &weights.by_log, &weights.by_difference})
        if (std::isnan(*weight)) *weight = std::numeric_limits<float>::quiet_NaN();
    return weights;
}

void write_gradient(const RowKernels& kernels, const Tensors& tensors, int64_t r, int64_t id, const RowState& state,
                    const Slopes& slopes, const Transform& transform, const KeptRow& kept) {
    const bool with_reference = tensors.reference && slopes.kl != 0;
    const Terms terms = terms_of(slopes.entropy != 0, with_reference);
    const Rows& logits = tensors.logits;
    const Target target = {id, target_gradient(kernels, tensors, r, id, state, slopes, transform)};
    const GradientWeights weights = gradient_weights(state, slopes, transform.temperature, with_reference);
    kernels.gradient[logits.dtype][terms](logits.row(r), with_reference ? tensors.reference->row(r) : nullptr,
                                          tensors.grad->row(r), logits.columns, transform.scaling, weights, target,
                                          kept, tensors.large_gradient());
}

// Asks for pages of 2 MB: the system has often not handed out the memory of a gradient yet, and does so several times
// faster in such pages.
void ask_for_large_pages(const Rows& rows) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(rows.row(0)) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(rows.row(rows.count - 1)) + rows.row_bytes()) / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)rows;
#endif
}

// Calls body(i) for live rows of the logits and dead(i) for the others, whose gradient is filled with zeros.
template <class IsLive, class Body, class Dead>
void over_rows(const RowKernels& kernels, const Tensors& tensors, int threads, IsLive is_live, Body body, Dead dead) {
    const Rows& logits = tensors.logits;
    const bool fill = tensors.grad && !tensors.zeroed;
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            if (is_live(i)) {
                body(i);
            } else {
                dead(i);
                if (fill) kernels.zero(tensors.grad->row(i), logits.row_bytes());
            }
        }
    };
    if (tensors.large_gradient()) ask_for_large_pages(*tensors.grad);
    int64_t busy = logits.count;
    if (!fill)
        for (int64_t i = 0; i < logits.count; ++i) busy -= !is_live(i);
    parallel_rows(logits.count, logits.columns, busy * logits.columns, threads, range, kernels.fence);
}

}  // namespace

int64_t find_bad_id(const LossTask& task, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        const Place place = task.arguments.place(task.where.row(i));
        if (!task.arguments.live(place)) continue;
        const int64_t id = task.arguments.ids.at(place);
        if (id < 0 || id >= columns) return id;
    }
    return kIgnored;
}

int64_t find_bad_id(const int64_t* ids, int64_t rows, int64_t columns) {
    const int64_t* bad =
        std::find_if(ids, ids + rows, [=](int64_t id) { return id != kIgnored && (id < 0 || id >= columns); });
    return bad == ids + rows ? kIgnored : *bad;
}

std::optional<float> find_bad_temperature(const LossTask& task, int64_t rows) {
    const Arguments& of = task.arguments;
    if (!of.temperatures) return {};
    for (int64_t i = 0; i < rows; ++i) {
        const Place place = of.place(task.where.row(i));
        if (of.live(place) && !is_usable(of.temperatures.at(place))) return of.temperatures.at(place);
    }
    return {};
}

std::optional<float> find_bad_temperature(const Temperatures& temperatures, const int64_t* ids, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row)
        if (ids[row] != kIgnored && !is_usable(temperatures.of(row))) return temperatures.of(row);
    return {};
}

void fused(const Tensors& tensors, const LossTask& task, const Results& results, int threads) {
    const RowKernels& chosen = kernels();
    const Arguments& of = task.arguments;
    const Weights weights(of);
    const auto is_live = [&](int64_t i) { return of.live(of.place(task.where.row(i))); };
    const auto dead = [&](int64_t i) {
        const int64_t row = task.where.row(i);
        for (int name = 0; name < kRows; ++name) results.rows[name * of.count + row] = 0;
        results.flags[row] = 0;
    };
    const auto body = [&](int64_t i) {
        const int64_t row = task.where.row(i);
        const Place place = of.place(row);
        const int64_t id = of.ids.at(place);
        const Transform transform(of.temperature(place), task.softcap);
        const KeptRow kept = kept_row(tensors, task.with_entropy);
        const RowState state = find_state(chosen, tensors, i, id, transform.scaling, task.with_entropy, kept);
        const Probabilities found = {float(state.logp), float(state.entropy), float(state.kl), task.with_entropy};
        TokenTerms terms = token_terms(of, place, weights.of(place), found);
        for (int name = 0; name < kRows; ++name) results.rows[name * of.count + row] = terms.row[name];
        results.flags[row] = terms.flags;
        if (!tensors.grad) return;
        if (task.upstream) {
            const float factor = task.upstream[row];
            terms.slopes = {terms.slopes.logp * factor, terms.slopes.entropy * factor, terms.slopes.kl * factor};
        }
        write_gradient(chosen, tensors, i, id, state, terms.slopes, transform, kept);
    };
    over_rows(chosen, tensors, threads, is_live, body, dead);
}

void statistics(const Tensors& tensors, const int64_t* ids, Temperatures temperatures, float softcap,
                bool with_entropy, float* state, int threads) {
    const RowKernels& chosen = kernels();
    const int64_t rows = tensors.logits.count;
    const auto put = [&](int64_t r, const RowState& row) {
        const double by_row[kStates] = {row.logp,     row.entropy,  row.kl,          row.max2,
                                        row.log2_sum, row.ref_max2, row.ref_log2_sum};
        for (int i = 0; i < kStates; ++i) state[i * rows + r] = float(by_row[i]);
    };
    over_rows(
        chosen, tensors, threads, [&](int64_t r) { return ids[r] != kIgnored; },
        [&](int64_t r) {
            const Transform transform(temperatures.of(r), softcap);
            put(r, find_state(chosen, tensors, r, ids[r], transform.scaling, with_entropy, {}));
        },
        [&](int64_t r) { put(r, {}); });
}

void apply(const Tensors& tensors, const int64_t* ids, const float* state, const float* slopes,
           Temperatures temperatures, float softcap, int threads) {
    const RowKernels& chosen = kernels();
    const int64_t rows = tensors.logits.count;
    const auto body = [&](int64_t r) {
        const auto at = [&](int i) { return state[i * rows + r]; };
        const RowState row_state = {at(kStateLogp), at(kStateEntropy), at(kStateKl),    at(kMax2),
                                    at(kLog2Sum),   at(kRefMax2),      at(kRefLog2Sum)};
        const Slopes by_row = {slopes[r], slopes[rows + r], slopes[2 * rows + r]};
        write_gradient(chosen, tensors, r, ids[r], row_state, by_row, {temperatures.of(r), softcap}, {});
    };
    over_rows(chosen, tensors, threads, [&](int64_t r) { return ids[r] != kIgnored; }, body, [](int64_t) {});
}

void scale_rows(const Rows& grad, const float* factors, int64_t stride, const int32_t* flags, int threads) {
    const RowKernels& chosen = kernels();
    const auto changes = [&](int64_t r) { return factors[r * stride] != 1 && (!flags || flags[r]); };
    const auto range = [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            if (changes(r)) chosen.scale[grad.dtype](grad.row(r), grad.columns, factors[r * stride]);
    };
    int64_t changed = 0;
    for (int64_t r = 0; r < grad.count; ++r) changed += changes(r);
    if (changed) parallel_rows(grad.count, grad.columns, changed * grad.columns, threads, range, chosen.fence);
}

}  // namespace repo
