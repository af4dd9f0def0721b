// Sampling of one token per row, from one uniform number.
#pragma once

#include <cstdint>

namespace repo {

// With e_v = exp((z_v - max z) / temperature), writes the first token whose e_0 + ... + e_v exceeds uniform times the sum
// of all, and log(e_token / sum). logits: (rows, vocabulary). uniforms: (rows,) in [0, 1). Sums are in double.
void sample_rows(const float* logits, int64_t rows, int64_t vocabulary, const double* uniforms, float temperature,
                 int64_t* tokens, float* logps, int threads);

}  // namespace repo
