// The operations of repo_kernels/cpu/__init__.py over raw memory; repo_kernels/rows.py says what the matrices hold.
#pragma once

#include <cstdint>

#include "losses/rows.h"
#include "losses/token_terms.h"

namespace repo {

constexpr int64_t kIgnored = -100;

// STATE, rows of a (7, N) matrix.
enum State { kStateLogp, kStateEntropy, kStateKl, kMax2, kLog2Sum, kRefMax2, kRefLog2Sum, kStates };

// Logits, the reference's where there is one (of the same shape and type), and the gradient's where it is wanted, which
// may be the logits.
struct Tensors {
    Rows logits;
    const Rows* reference;
    const Rows* grad;
    bool zeroed;  // the gradient holds zeros, so that its dead rows need not be written

    // A gradient that no cache could keep for its reader is written past the caches.
    bool large_gradient() const {
        constexpr int64_t kLarge = 4 << 20;
        return grad && grad->base != logits.base && grad->count * grad->row_bytes() > kLarge;
    }
};

// First id of a live row outside [0, columns), or kIgnored when there is none.
int64_t find_bad_id(const int64_t* ids, int64_t rows, int64_t columns);

struct LossInputs {
    const int64_t* ids;
    const float* values;  // (kValues, N)
    Scalars scalars;
    Code code;
    float softcap;
    bool with_entropy;
};

// losses: (N,). tokens: (kTokens, N). Ids are valid. Dead rows: zeros.
void fused(const Tensors& tensors, const LossInputs& in, float* losses, float* tokens, int threads);

// state: (kStates, N).
void statistics(const Tensors& tensors, const int64_t* ids, const Scalars& scalars, float softcap, bool with_entropy,
                float* state, int threads);

// state: (kStates, N). slopes: (3, N).
void apply(const Tensors& tensors, const int64_t* ids, const float* state, const float* slopes, const Scalars& scalars,
           float softcap, int threads);

// factors: N of them, `stride` apart.
void scale_rows(const Rows& grad, const float* factors, int64_t stride, int threads);

}  // namespace repo
