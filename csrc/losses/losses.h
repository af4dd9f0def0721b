// The functions of repo_kernels/backends/cpu/losses.py over raw memory. The matrices are those of
// repo_kernels/backends/interface.py.
#pragma once

#include <cstdint>

#include "losses/rows.h"
#include "losses/token_terms.h"

namespace repo {

constexpr int64_t kIgnored = -100;

// STATE: rows of the state (7, N).
enum State { kStateLogp, kStateEntropy, kStateKl, kMax2, kLog2Sum, kRefMax2, kRefLog2Sum, kStates };

// The logits; the reference's logits of the same shape and type, or null; the gradient, which may be the logits
// themselves, or null.
struct Tensors {
    Rows logits;
    const Rows* reference;
    const Rows* grad;
    bool zeroed;  // the gradient is filled with zeros, so that its dead rows need not be written

    // Whether the gradient is too large for a cache to keep it for its reader; it is then written past the caches.
    bool large_gradient() const {
        constexpr int64_t kLarge = 4 << 20;
        return grad && grad->base != logits.base && grad->count * grad->row_bytes() > kLarge;
    }
};

// Returns the first live id outside [0, columns), or kIgnored if there is none.
int64_t find_bad_id(const int64_t* ids, int64_t rows, int64_t columns);

struct LossInputs {
    const int64_t* ids;
    const float* values;  // (kValues, N)
    Scalars scalars;
    Code code;
    float softcap;
    bool with_entropy;
};

// Writes losses (N,), tokens (kTokens, N) and the gradient; zeros on dead rows. Ids must be valid.
void fused(const Tensors& tensors, const LossInputs& in, float* losses, float* tokens, int threads);

// Writes state (kStates, N).
void statistics(const Tensors& tensors, const int64_t* ids, const Scalars& scalars, float softcap, bool with_entropy,
                float* state, int threads);

// Writes the gradient from state (kStates, N) and slopes (3, N).
void apply(const Tensors& tensors, const int64_t* ids, const float* state, const float* slopes, const Scalars& scalars,
           float softcap, int threads);

// Multiplies the rows of grad by N factors, which are `stride` apart.
void scale_rows(const Rows& grad, const float* factors, int64_t stride, int threads);

}  // namespace repo
