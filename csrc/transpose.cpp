#include "transpose.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "parallel.h"

namespace repo {
namespace {

constexpr int64_t kTall = 16;     // rows at once: a whole line of each row of the result
constexpr int64_t kStrip = 64;    // columns that a thread takes at once, and reads in order
constexpr int64_t kPerLine = 16;  // floats

typedef float Four __attribute__((vector_size(16)));

inline Four load(const float* from) {
    Four v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// kStream: past the caches, of which `to` would else have to be read first; it is aligned to the vector then.
template <bool kStream>
inline void store(float* to, Four v) {
#if defined(__SSE2__)
    if (kStream) return _mm_stream_ps(to, v);
#endif
    std::memcpy(to, &v, sizeof v);
}

void finish_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <bool kStream>
inline void transpose_square(const float* from, int64_t stride, float* to, int64_t rows) {
    const Four a = load(from), b = load(from + stride), c = load(from + 2 * stride), d = load(from + 3 * stride);
    const Four ab_low = {a[0], b[0], a[1], b[1]}, cd_low = {c[0], d[0], c[1], d[1]};
    const Four ab_high = {a[2], b[2], a[3], b[3]}, cd_high = {c[2], d[2], c[3], d[3]};
    store<kStream>(to, Four{ab_low[0], ab_low[1], cd_low[0], cd_low[1]});
    store<kStream>(to + rows, Four{ab_low[2], ab_low[3], cd_low[2], cd_low[3]});
    store<kStream>(to + 2 * rows, Four{ab_high[0], ab_high[1], cd_high[0], cd_high[1]});
    store<kStream>(to + 3 * rows, Four{ab_high[2], ab_high[3], cd_high[2], cd_high[3]});
}

void transpose_edge(const float* from, int64_t stride, float* to, int64_t rows, int64_t height, int64_t width) {
    for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < height; ++r) to[c * rows + r] = from[r * stride + c];
}

// kTall rows of `width` columns; the rows after them, if there are any, are fetched meanwhile.
template <bool kStream>
void transpose_tall(const float* from, int64_t stride, float* to, int64_t rows, int64_t width, bool more) {
    if (more)
        for (int64_t r = kTall; r < 2 * kTall; ++r)
            for (int64_t c = 0; c < width; c += kPerLine) __builtin_prefetch(from + r * stride + c);
    const int64_t whole = width / 4 * 4;
    for (int64_t c = 0; c < whole; c += 4)
        for (int64_t r = 0; r < kTall; r += 4)
            transpose_square<kStream>(from + r * stride + c, stride, to + c * rows + r, rows);
    transpose_edge(from + whole, stride, to + whole * rows, rows, kTall, width - whole);
}

}  // namespace

void transpose(const float* from, int64_t rows, int64_t columns, int64_t stride, float* to, int threads) {
    // lines that are not written whole would be slower past the caches
    const bool lines = rows % kPerLine == 0 && reinterpret_cast<uintptr_t>(to) % (kPerLine * sizeof(float)) == 0;
    const auto tall = lines ? transpose_tall<true> : transpose_tall<false>;
    const auto strip = [&](int64_t column) {
        const int64_t width = std::min(kStrip, columns - column), whole = rows / kTall * kTall;
        for (int64_t r = 0; r < whole; r += kTall)
            tall(from + r * stride + column, stride, to + column * rows + r, rows, width, r + 2 * kTall <= rows);
        transpose_edge(from + whole * stride + column, stride, to + column * rows + whole, rows, rows - whole, width);
    };
    const auto strips = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) strip(i * kStrip);
    };
    parallel_rows((columns + kStrip - 1) / kStrip, kStrip * rows, rows * columns, threads, strips, finish_streams);
}

}  // namespace repo
