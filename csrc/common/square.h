// Transposes squares of four by four floats.
#pragma once

#include <cstdint>
#include <cstring>

namespace repo {
namespace {  // a copy for each instruction set

typedef float Four __attribute__((vector_size(16)));

inline Four load(const float* from) {
    Four v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Four v) { std::memcpy(to, &v, sizeof v); }

inline void transpose_square(const float* from, int64_t stride, float* to, int64_t rows) {
    const Four a = load(from), b = load(from + stride), c = load(from + 2 * stride), d = load(from + 3 * stride);
    const Four ab_low = {a[0], b[0], a[1], b[1]}, cd_low = {c[0], d[0], c[1], d[1]};
    const Four ab_high = {a[2], b[2], a[3], b[3]}, cd_high = {c[2], d[2], c[3], d[3]};
    store(to, Four{ab_low[0], ab_low[1], cd_low[0], cd_low[1]});
    store(to + rows, Four{ab_low[2], ab_low[3], cd_low[2], cd_low[3]});
    store(to + 2 * rows, Four{ab_high[0], ab_high[1], cd_high[0], cd_high[1]});
    store(to + 3 * rows, Four{ab_high[2], ab_high[3], cd_high[2], cd_high[3]});
}

}  // namespace
}  // namespace repo
