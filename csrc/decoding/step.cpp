#include "decoding/step.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>

#include "common/parallel.h"
#include "kernels/dispatch.h"
#include "decoding/tiles.h"

namespace repo {
namespace {

constexpr int kSpins = 1 << 12;  // looks at a counter before the core is offered to others
constexpr int kPages = 4;        // of a weight, fetched while others finish the phase before it

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Work that all threads share. Each begins at a range of its own, whose items it takes in order, and then helps with the
// other ranges. The phase ends when every item is done, by however many threads are there: one that the system does not
// run takes no item, and nobody waits for it.
class Phase {
  public:
    explicit Phase(int threads) : ranges_(threads) {}

    int64_t first_of(int64_t items, int thread) const { return items * thread / int64_t(ranges_.size()); }

    template <class Body>
    void run(int64_t items, int thread, Body body) {
        const int count = int(ranges_.size());
        for (int r = 0; r < count; ++r) {
            const int range = (thread + r) % count;
            const int64_t first = first_of(items, range), size = first_of(items, range + 1) - first;
            std::atomic<int64_t>& taken = ranges_[range].taken;
            if (taken.load(std::memory_order_relaxed) >= size) continue;
            int64_t finished = 0;
            for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < size; ++finished) body(first + i);
            done_.fetch_add(finished, std::memory_order_release);
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < items; ++spins)
            spins < kSpins ? pause() : std::this_thread::yield();
    }

  private:
    struct alignas(64) Range {
        std::atomic<int64_t> taken{0};
    };
    std::vector<Range> ranges_;
    alignas(64) std::atomic<int64_t> done_{0};
};

// Scratch memory of one thread.
struct Scratch {
    int thread;
    std::vector<float> row, heads, scores;
    alignas(64) float sums[kTileRows * kPanelColumns], more[kTileRows * kPanelColumns];
};

class Decoding {
  public:
    Decoding(const DecoderModel& model, const DecodeStep& step, int threads)
        : model_(model), step_(step), threads_(threads), normed_(inputs(model.hidden)),
          attended_(inputs(model.heads * model.columns)), inner_(inputs(model.inner)),
          qkv_(step.rows * qkv_width()) {
        for (size_t i = 0; i < model.layers.size() * 7 + 2; ++i) phases_.emplace_back(threads);
    }

    static void run(void* self) { static_cast<Decoding*>(self)->work(); }

  private:
    Tiles inputs(int64_t depth) const { return Tiles(step_.rows, depth, model_.half, kernels_); }
    int64_t qkv_width() const { return (model_.heads + 2 * model_.key_heads) * model_.columns; }

    // What each thread does.
    void work() {
        Scratch scratch;
        scratch.thread = started_.fetch_add(1) % threads_;
        scratch.row.resize(model_.hidden);
        scratch.heads.resize((2 * model_.heads / model_.key_heads + 2) * model_.columns);
        scratch.scores.resize(model_.heads / model_.key_heads * step_.capacity);
        auto phase = phases_.begin();
        for (size_t l = 0; l < model_.layers.size(); ++l) {
            const LayerWeights& layer = model_.layers[l];
            fetch(layer.qkv, qkv_width(), model_.hidden, scratch);
            normalise(*phase++, layer.input_norm, scratch);
            project(*phase++, layer, scratch);
            fetch(layer.out, model_.hidden, model_.heads * model_.columns, scratch);
            attend(*phase++, layer, int64_t(l), scratch);
            add_product(*phase++, attended_, layer.out, layer.out_bias, scratch);
            fetch(layer.gate, model_.inner, model_.hidden, scratch);
            normalise(*phase++, layer.post_norm, scratch);
            gate(*phase++, layer, scratch);
            fetch(layer.down, model_.hidden, model_.inner, scratch);
            add_product(*phase++, inner_, layer.down, nullptr, scratch);
        }
        normalise(*phase++, model_.norm, scratch);
        read_out(*phase++, scratch);
    }

    // Fetches the first pages of the part of a packed weight that this thread begins with.
    void fetch(const float* packed, int64_t outputs, int64_t depth, const Scratch& scratch) const {
        const int64_t panel = panels_of(outputs) * scratch.thread / threads_;
        const int64_t size = kPanelColumns * words_of(depth, model_.half);
        for (int64_t i = 0; i < std::min<int64_t>(size, kPages * 1024); i += 16)
            __builtin_prefetch(packed + panel * size + i);
    }

    void normalise(Phase& phase, const float* weight, Scratch& scratch) {
        phase.run(step_.rows, scratch.thread, [&](int64_t row) {
            kernels_.norm(step_.x + row * model_.hidden, weight, scratch.row.data(), model_.hidden, model_.epsilon);
            normed_.put(row, 0, scratch.row.data(), model_.hidden);
        });
    }

    // Calls take(first row, rows, first column, sums) for the products of all tiles with each panel.
    template <class Take>
    void multiply(Phase& phase, const Tiles& tiles, const float* packed, int64_t outputs, Scratch& scratch, Take take) {
        phase.run(panels_of(outputs), scratch.thread, [&](int64_t p) {
            const float* panel = packed + p * kPanelColumns * tiles.words();
            for (int64_t row = 0; row < step_.rows; row += kTileRows) {
                const int64_t count = std::min(kTileRows, step_.rows - row);
                tiles.multiply(row, panel, count, scratch.sums);
                take(row, count, p * kPanelColumns, scratch.sums);
            }
        });
    }

    void project(Phase& phase, const LayerWeights& layer, Scratch& scratch) {
        const int64_t width = qkv_width();
        const auto take = [&](int64_t row, int64_t count, int64_t column, const float* sums) {
            for (int64_t i = 0; i < count; ++i)
                for (int64_t c = 0; c < kPanelColumns; ++c)
                    qkv_[(row + i) * width + column + c] =
                        sums[i * kPanelColumns + c] + (layer.qkv_bias ? layer.qkv_bias[column + c] : 0);
        };
        multiply(phase, normed_, layer.qkv, width, scratch, take);
    }

    // Writes a normalised (unless weight is null) and rotated head.
    void turn(const float* head, const float* weight, int64_t row, float* normed, float* to) const {
        const int64_t columns = model_.columns;
        if (weight) kernels_.norm(head, weight, normed, columns, model_.epsilon), head = normed;
        kernels_.rotate(head, step_.cos + row * columns, step_.sin + row * columns, to, columns / 2, false);
    }

    void attend(Phase& phase, const LayerWeights& layer, int64_t index, Scratch& scratch) {
        const int64_t columns = model_.columns, group = model_.heads / model_.key_heads;
        const int64_t capacity = step_.capacity, size = columns * capacity;
        phase.run(step_.rows * model_.key_heads, scratch.thread, [&](int64_t item) {
            const int64_t row = item / model_.key_heads, head = item % model_.key_heads, at = step_.lengths[row];
            const int64_t place = ((index * step_.places + step_.slots[row]) * model_.key_heads + head) * size;
            const float* states = qkv_.data() + row * qkv_width();
            const float *key = states + (model_.heads + head) * columns, *value = key + model_.key_heads * columns;
            float *keys = step_.keys + place, *values = step_.values + place;
            float *queries = scratch.heads.data(), *out = queries + group * columns, *normed = out + group * columns;
            float* turned = normed + columns;
            turn(key, layer.k_norm, row, normed, turned);
            for (int64_t c = 0; c < columns; ++c) keys[c * capacity + at] = turned[c];
            std::copy_n(value, columns, values + at * columns);
            for (int64_t g = 0; g < group; ++g)
                turn(states + (head * group + g) * columns, layer.q_norm, row, normed, queries + g * columns);
            kernels_.attend_one({group, at + 1, columns, capacity, model_.scale, queries, keys, values, out},
                                scratch.scores.data());
            attended_.put(row, head * group * columns, out, group * columns);
        });
    }

    void add_product(Phase& phase, const Tiles& tiles, const float* packed, const float* bias, Scratch& scratch) {
        const auto take = [&](int64_t row, int64_t count, int64_t column, const float* sums) {
            for (int64_t i = 0; i < count; ++i)
                for (int64_t c = 0; c < kPanelColumns; ++c)
                    step_.x[(row + i) * model_.hidden + column + c] +=
                        sums[i * kPanelColumns + c] + (bias ? bias[column + c] : 0);
        };
        multiply(phase, tiles, packed, model_.hidden, scratch, take);
    }

    void gate(Phase& phase, const LayerWeights& layer, Scratch& scratch) {
        const int64_t panels = model_.inner / kPanelColumns, size = kPanelColumns * normed_.words();
        phase.run(panels, scratch.thread, [&](int64_t p) {
            for (int64_t row = 0; row < step_.rows; row += kTileRows) {
                const int64_t count = std::min(kTileRows, step_.rows - row);
                normed_.multiply(row, layer.gate + p * size, count, scratch.sums);
                normed_.multiply(row, layer.up + p * size, count, scratch.more);
                kernels_.swiglu(scratch.sums, scratch.more, scratch.sums, count * kPanelColumns);
                for (int64_t i = 0; i < count; ++i)
                    inner_.put(row + i, p * kPanelColumns, scratch.sums + i * kPanelColumns, kPanelColumns);
            }
        });
    }

    void read_out(Phase& phase, Scratch& scratch) {
        const int64_t width = model_.vocabulary;
        const auto take = [&](int64_t row, int64_t count, int64_t column, const float* sums) {
            for (int64_t i = 0; i < count; ++i)
                std::copy_n(sums + i * kPanelColumns, std::min(kPanelColumns, width - column),
                            step_.logits + (row + i) * width + column);
        };
        multiply(phase, normed_, model_.head, width, scratch, take);
    }

    const RowKernels& kernels_ = kernels();
    const DecoderModel& model_;
    const DecodeStep& step_;
    int threads_;
    std::atomic<int> started_{0};
    std::deque<Phase> phases_;
    Tiles normed_, attended_, inner_;
    std::vector<float> qkv_;
};

}  // namespace

void decode_step(const DecoderModel& model, const DecodeStep& step, int threads) {
    Decoding decoding(model, step, std::max(threads, 1));
    on_threads(threads, Decoding::run, &decoding);
}

}  // namespace repo
