// The functions of repo_kernels/backends/cpu/losses.py over raw memory.
#pragma once

#include <cstdint>
#include <optional>

#include "losses/arguments.h"
#include "losses/rows.h"

namespace repo {

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

// Which rows of a loss the rows of the logits are: those at `index`, or consecutive ones from `first` on.
struct RowRange {
    int64_t first;
    const int64_t* index;

    int64_t row(int64_t i) const { return index ? index[i] : first + i; }
};

struct LossTask {
    Arguments arguments;
    RowRange where;
    const float* upstream;  // (N,), multiplies the gradient of each row, or null
    float softcap;
    bool with_entropy;
};

// The results of all N rows, and how they are summed up.
struct Results {
    float* rows;     // (kRows, N)
    int32_t* flags;  // (N,)
};

// The temperatures of rows, `stride` apart, or the one of all rows.
struct Temperatures {
    const float* data;
    int64_t stride;
    bool by_row;

    float of(int64_t row) const { return data[row * stride]; }
};

// Returns the first live id outside [0, columns) of the rows of the logits, or kIgnored if there is none.
int64_t find_bad_id(const LossTask& task, int64_t rows, int64_t columns);

// The same of plain ids (N,).
int64_t find_bad_id(const int64_t* ids, int64_t rows, int64_t columns);

// Returns the first of the live rows' own temperatures that is not a positive normal number, if there is one.
std::optional<float> find_bad_temperature(const LossTask& task, int64_t rows);

// The same of plain ids (N,).
std::optional<float> find_bad_temperature(const Temperatures& temperatures, const int64_t* ids, int64_t rows);

// Writes results and the gradient of the rows of the logits; zeros on dead rows. Ids must be valid.
void fused(const Tensors& tensors, const LossTask& task, const Results& results, int threads);

// Writes state (kStates, N).
void statistics(const Tensors& tensors, const int64_t* ids, Temperatures temperatures, float softcap,
                bool with_entropy, float* state, int threads);

// Writes the gradient from state (kStates, N) and slopes (3, N).
void apply(const Tensors& tensors, const int64_t* ids, const float* state, const float* slopes,
           Temperatures temperatures, float softcap, int threads);

// Multiplies the rows of grad by factors that are `stride` apart, but for rows whose flags (or null) are 0.
void scale_rows(const Rows& grad, const float* factors, int64_t stride, const int32_t* flags, int threads);

}  // namespace repo
