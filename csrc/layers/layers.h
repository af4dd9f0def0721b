// RMSNorm, SwiGLU and rotary embedding in fp32, each in one pass over memory.
#pragma once

#include <cstdint>

namespace repo {

// (rows, columns), contiguous.
struct Shape {
    int64_t rows, columns;
};

// Writes y = weight x inverse and inverse (rows,) = (mean x^2 + epsilon)^(-1/2) of each row.
void rms_norm(const float* x, const float* weight, float* y, float* inverse, Shape shape, float epsilon, int threads);

// Writes dx and, unless it is null, dweight (columns,), which is summed in an order that depends on the shape alone.
void rms_norm_gradient(const float* x, const float* weight, const float* inverse, const float* dy, float* dx,
                       float* dweight, Shape shape, int threads);

// Writes out = silu(gate) up, `count` elements of each.
void swiglu(const float* gate, const float* up, float* out, int64_t count, int threads);

// Writes the gradients of gate and up.
void swiglu_gradient(const float* gate, const float* up, const float* grad, float* of_gate, float* of_up, int64_t count,
                     int threads);

// A tensor (batch, heads, tokens, columns) with consecutive columns; strides in elements.
template <class T>
struct Heads {
    T* data;
    int64_t batch, heads, tokens, columns, by_batch, by_head, by_token;

    T* row(int64_t b, int64_t h, int64_t t) const { return data + b * by_batch + h * by_head + t * by_token; }
};

// Writes y = x cos + rotate_half(x) sin of each head; cos and sin have one head for all. back: the transposed map.
void rotate(const Heads<const float>& x, const Heads<const float>& cos, const Heads<const float>& sin,
            const Heads<float>& y, bool back, int threads);

}  // namespace repo
