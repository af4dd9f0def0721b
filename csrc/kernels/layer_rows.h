// RMSNorm, SwiGLU and rotary embedding, one row at a time.
#pragma once

#include "kernels/exponential.h"
#include "kernels/row_kernels.h"

namespace repo::REPO_ISA {

// A whole vector of a row, and the rest at its end, with zeros beyond.
struct Whole {
    int64_t at;

    Vec load(const float* row) const { return load_bits<Vec>(row + at); }
    void store(float* row, Vec x) const { store_bits(row + at, x); }
};

struct Rest {
    int64_t at, count;

    Vec load(const float* row) const {
        float elements[kWidth] = {};
        std::memcpy(elements, row + at, count * sizeof(float));
        return load_bits<Vec>(elements);
    }
    void store(float* row, Vec x) const {
        float elements[kWidth];
        store_bits(elements, x);
        std::memcpy(row + at, elements, count * sizeof(float));
    }
};

template <class Body>
inline void by_vectors(int64_t columns, Body body) {
    const int64_t whole = columns / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) body(Whole{i});
    if (whole < columns) body(Rest{whole, columns - whole});
}

// Writes y = w x r and returns r = (mean x^2 + epsilon)^(-1/2).
inline float norm_row(const float* x, const float* weight, float* y, int64_t columns, float epsilon) {
    Vec squares = {};
    by_vectors(columns, [&](auto part) {
        const Vec v = part.load(x);
        squares = multiply_add(v, v, squares);
    });
    const float r = 1 / __builtin_sqrtf(sum_lanes(squares) / float(columns) + epsilon);
    by_vectors(columns, [&](auto part) { part.store(y, part.load(weight) * (part.load(x) * r)); });
    return r;
}

// With n = x r, the normalised row: writes dx = r (w dy - n mean(w dy n)) and adds dy n to dw unless that is null.
inline void norm_gradient_row(const float* x, const float* weight, float r, const float* dy, float* dx, float* dw,
                              int64_t columns) {
    Vec products = {};
    by_vectors(columns, [&](auto part) {
        const Vec n = part.load(x) * r, upstream = part.load(dy);
        products = multiply_add(part.load(weight) * upstream, n, products);
        if (dw) part.store(dw, multiply_add(upstream, n, part.load(dw)));
    });
    const float mean = sum_lanes(products) / float(columns);
    by_vectors(columns, [&](auto part) {
        const Vec n = part.load(x) * r;
        part.store(dx, r * (part.load(weight) * part.load(dy) - n * mean));
    });
}

// Returns 1 / (1 + e^-x), computed from e^-|x|, which cannot overflow.
inline Vec sigmoid(Vec x, const Power<5>& power) {
    constexpr float kMinusLog2E = -1.4426950408889634f;
    const Vec magnitude = bit_cast<Vec>(bit_cast<UIntVec>(x) & 0x7fffffffu);
    const Vec e = scaled_exp2(magnitude * kMinusLog2E, power);
    return (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// Writes g s u with s = sigmoid(g).
inline void swiglu_row(const float* gate, const float* up, float* out, int64_t columns) {
    const Power<5> power(1.0f);
    by_vectors(columns, [&](auto part) {
        const Vec g = part.load(gate);
        part.store(out, g * sigmoid(g, power) * part.load(up));
    });
}

// Writes dg = d u s (1 + g (1 - s)) and du = d g s.
inline void swiglu_gradient_row(const float* gate, const float* up, const float* grad, float* of_gate, float* of_up,
                                int64_t columns) {
    const Power<5> power(1.0f);
    by_vectors(columns, [&](auto part) {
        const Vec g = part.load(gate), s = sigmoid(g, power), d = part.load(grad);
        part.store(of_gate, d * part.load(up) * (s * multiply_add(g, 1.0f - s, broadcast(1.0f))));
        part.store(of_up, d * (g * s));
    });
}

// Writes (a cos - b sin, b cos' + a sin') for the halves (a, b) of a head; cos' and sin' are the second halves. back:
// the transposed map, (a cos + b sin', b cos' - a sin).
inline void rotate_row(const float* x, const float* cos, const float* sin, float* y, int64_t half, bool back) {
    by_vectors(half, [&](auto part) {
        const Vec a = part.load(x), b = part.load(x + half);
        const Vec low = part.load(sin), high = part.load(sin + half);
        part.store(y, a * part.load(cos) + b * (back ? high : -low));
        part.store(y + half, b * part.load(cos + half) + a * (back ? -low : high));
    });
}

}  // namespace repo::REPO_ISA
