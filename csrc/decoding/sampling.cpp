#include "decoding/sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "kernels/dispatch.h"

namespace repo {
namespace {

constexpr int64_t kBlock = 512;  // terms whose sum is kept, so that only one block is computed twice

// The terms e_v of one row.
struct RowTerms {
    const RowKernels& kernels;
    const float* logits;
    int64_t vocabulary;
    float c, max2;

    int64_t size(int64_t block) const { return std::min(kBlock, vocabulary - block * kBlock); }
    double sum(int64_t block, float* e) const {
        kernels.powers(logits + block * kBlock, e, size(block), c, max2);
        double total = 0;
        for (int64_t i = 0; i < size(block); ++i) total += e[i];
        return total;
    }
};

void sample_row(const RowTerms& terms, double uniform, std::vector<double>& sums, int64_t* token, float* logp) {
    float e[kBlock];
    double total = 0;
    const int64_t blocks = int64_t(sums.size());
    for (int64_t b = 0; b < blocks; ++b) total += sums[b] = terms.sum(b, e);
    const double threshold = uniform * total;
    double before = 0;
    int64_t block = 0;
    while (block + 1 < blocks && !(before + sums[block] > threshold)) before += sums[block++];
    terms.sum(block, e);
    int64_t place = 0;
    const int64_t last = terms.size(block) - 1;
    for (double reached = before + e[0]; place < last && !(reached > threshold); reached += e[++place]) {}
    while (place > 0 && e[place] == 0) --place;  // beyond the last boundary by rounding
    *token = block * kBlock + place;
    *logp = float(std::log(double(e[place]) / total));
}

}  // namespace

void sample_rows(const float* logits, int64_t rows, int64_t vocabulary, const double* uniforms, float temperature,
                 int64_t* tokens, float* logps, int threads) {
    const RowKernels& chosen = kernels();
    const float c = float(1.4426950408889634 / double(temperature));
    const auto range = [&](int64_t begin, int64_t end) {
        std::vector<double> sums((vocabulary + kBlock - 1) / kBlock);
        for (int64_t r = begin; r < end; ++r) {
            const float* row = logits + r * vocabulary;
            const RowTerms terms = {chosen, row, vocabulary, c, chosen.largest(row, vocabulary) * c};
            sample_row(terms, uniforms[r], sums, tokens + r, logps + r);
        }
    };
    parallel_rows(rows, vocabulary, rows * vocabulary, threads, range, [] {});
}

}  // namespace repo
