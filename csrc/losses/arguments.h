// The arguments of a loss as the caller gave them: RowArguments of repo_kernels/backends/interface.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "losses/codes.h"

namespace repo {

// Where a row is: the index of its sequence, and its own index, in the sequence of (B, L) or among all packed rows.
struct Place {
    int64_t sequence, token;
};

// A value for each token, or for each sequence, with any strides (in elements). Null: absent.
template <class T>
struct Column {
    const T* data = nullptr;
    int64_t by_sequence = 0, by_token = 0;

    explicit operator bool() const { return data; }
    T at(Place place) const { return data[place.sequence * by_sequence + place.token * by_token]; }
};

struct Arguments {
    int64_t count;               // N
    bool packed;                 // (T,), not (B, L)
    int64_t length;              // L of (B, L)
    int64_t sequences;           // S
    const int32_t* bounds;       // (S + 1,) of packed rows, or null: each is a sequence
    Column<int64_t> ids;
    Column<bool> mask;
    Column<float> reward_advantages, cost_advantages, costs, cost_limits, cost_baselines, old_logps, ref_logps,
        importance_weights, temperatures;
    Scalars scalars;
    Code code;

    // The first row of a sequence, and the one after its last.
    int64_t begin(int64_t sequence) const {
        if (bounds) return std::clamp<int64_t>(bounds[sequence], 0, count);
        return sequence * (packed ? 1 : length);
    }
    int64_t end(int64_t sequence) const {
        if (bounds) return std::clamp<int64_t>(bounds[sequence + 1], 0, count);
        return (sequence + 1) * (packed ? 1 : length);
    }

    Place place(int64_t row, int64_t sequence) const { return {sequence, packed ? row : row - sequence * length}; }

    // The sequence is -1 for a row outside the bounds, which is dead.
    Place place(int64_t row) const {
        if (!packed) return {row / length, row % length};
        if (!bounds) return {row, row};
        const int64_t after = std::upper_bound(bounds, bounds + sequences + 1, row) - bounds;
        return {after > sequences ? -1 : after - 1, row};  // -1 also before the first bound
    }

    bool live(Place place) const {
        return place.sequence >= 0 && ids.at(place) != kIgnored && (!mask || mask.at(place));
    }
    float cost_limit(Place place) const { return cost_limits ? cost_limits.at(place) : scalars.cost_limit; }
    float temperature(Place place) const { return temperatures ? temperatures.at(place) : scalars.temperature; }

    // {C - d}^+; 0 without costs.
    float hinge(Place place) const {
        if (!costs) return 0;
        const float excess = costs.at(place) - cost_limit(place);
        return excess < 0 ? 0 : excess;
    }
};

}  // namespace repo
