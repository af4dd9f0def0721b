#include "decoding/packed_weight.h"

#include <algorithm>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/parallel.h"
#include "common/square.h"
#include "decoding/tiles.h"
#include "kernels/dispatch.h"

namespace repo {

void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 1 << 21;
    const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

namespace {

// Packs a panel of `rows` rows of words.
void pack_panel(const float* from, int64_t stride, int64_t rows, int64_t words, float* panel) {
    const int64_t whole = rows / 4 * 4, columns = words / 4 * 4;
    for (int64_t c = 0; c < columns; c += 4)
        for (int64_t r = 0; r < whole; r += 4)
            transpose_square(from + r * stride + c, stride, panel + c * kPanelColumns + r, kPanelColumns);
    for (int64_t c = 0; c < words; ++c) {
        for (int64_t r = c < columns ? whole : 0; r < rows; ++r) panel[c * kPanelColumns + r] = from[r * stride + c];
        for (int64_t r = rows; r < kPanelColumns; ++r) panel[c * kPanelColumns + r] = 0;
    }
}

}  // namespace

void pack_weight(const float* weight, int64_t outputs, int64_t depth, float* to, bool half, int threads) {
    const RowKernels& chosen = kernels();
    const int64_t words = words_of(depth, half);
    const auto range = [&](int64_t begin, int64_t end) {
        std::vector<float> rounded(half ? kPanelColumns * words : 0);
        for (int64_t p = begin; p < end; ++p) {
            const int64_t rows = std::min(kPanelColumns, outputs - p * kPanelColumns);
            const float* from = weight + p * kPanelColumns * depth;
            if (half) chosen.round_to_half(from, reinterpret_cast<uint16_t*>(rounded.data()), rows * depth);
            pack_panel(half ? rounded.data() : from, words, rows, words, to + p * kPanelColumns * words);
        }
    };
    parallel_rows(panels_of(outputs), kPanelColumns * depth, outputs * depth, threads, range, [] {});
}

void multiply_packed(const float* x, int64_t rows, int64_t depth, const float* packed, bool half, int64_t outputs,
                     const float* bias, float* out, int threads) {
    Tiles tiles(rows, depth, half, kernels());
    const auto fill = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) tiles.put(r, 0, x + r * depth, depth);
    };
    parallel_rows(rows, depth, rows * depth, threads, fill, [] {});
    const auto range = [&](int64_t begin, int64_t end) {
        float sums[kTileRows * kPanelColumns];
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * kPanelColumns, columns = std::min(kPanelColumns, outputs - first);
            for (int64_t row = 0; row < rows; row += kTileRows) {
                const int64_t count = std::min(kTileRows, rows - row);
                tiles.multiply(row, packed + first * tiles.words(), count, sums);
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t c = 0; c < columns; ++c)
                        out[(row + i) * outputs + first + c] = sums[i * kPanelColumns + c] + (bias ? bias[first + c] : 0);
            }
        }
    };
    const int64_t work = kPanelColumns * depth;
    parallel_rows(panels_of(outputs), work, outputs * depth * 4, threads, range, [] {});
}

}  // namespace repo
