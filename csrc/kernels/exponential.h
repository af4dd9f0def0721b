// 2^t by polynomials, and functions made of it.
#pragma once

#include "kernels/simd.h"

extern "C" double exp2(double);

namespace repo::REPO_ISA {

// Returns 2^shift, or 0 where that is below every float.
inline double exp2_or_zero(double shift) { return shift < -149 ? 0 : exp2(shift); }

// Coefficients of 2^f on [-1/2, 1/2], minimax in the relative error with 2^0 = 1 exactly: 1.1e-7 for degree 5, 2.9e-6
// for 4, 1.1e-4 for 3.
template <int kDegree>
constexpr float kPower[kDegree + 1] = {};
template <>
constexpr float kPower<5>[] = {1, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
template <>
constexpr float kPower<4>[] = {1, 0x1.62e12cp-1f, 0x1.ec0378p-3f, 0x1.c9fc46p-5f, 0x1.3a02ccp-7f};
template <>
constexpr float kPower<3>[] = {1, 0x1.62f5fap-1f, 0x1.f00c4cp-3f, 0x1.c2a218p-5f};

// The polynomial times a factor that many t share.
template <int kDegree>
struct Power {
    Vec coefficient[kDegree + 1];

    explicit Power(float factor) {
        for (int i = 0; i <= kDegree; ++i) coefficient[i] = broadcast(factor * kPower<kDegree>[i]);
    }

    // Returns factor (2^f - 1) / f.
    Vec quotient(Vec f) const {
        Vec q = coefficient[kDegree];
        for (int i = kDegree - 1; i > 0; --i) q = multiply_add(f, q, coefficient[i]);
        return q;
    }

    Vec operator()(Vec f) const { return multiply_add(f, quotient(f), coefficient[0]); }
};

// t = k + f with an integer k and |f| <= 1/2. bits: k in the lowest bits.
struct Parts {
    UIntVec bits;
    Vec f;
};

// Adding 1.5 2^23 + bias rounds to the nearest integer and leaves k + bias in the lowest bits.
inline Parts split(Vec t, float bias) {
    const float round = 12582912.0f + bias;
    const Vec rounded = t + round;
    return {bit_cast<UIntVec>(rounded), t - (rounded - round)};
}

// Returns max(t, -127), where NaN stays NaN.
inline Vec clamp_exponent(Vec t) { return larger(broadcast(-127.0f), t); }

// Returns factor 2^t for t <= 127. Below 2^-126 the result may be 0.
template <int kDegree>
inline Vec scaled_exp2(Vec t, const Power<kDegree>& power) {
#if defined(__AVX512F__)
    const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT);  // 0 for an infinite t
    return _mm512_scalef_ps(power(f), t - f);
#else
    // 127 is the bias of the exponent: at k = -127 its bits are 0, and so is the result
    const Parts parts = split(clamp_exponent(t), 127.0f);
    return bit_cast<Vec>(parts.bits << 23) * power(parts.f);
#endif
}

// cap tanh(z / cap), and its derivative, which does not cancel near the cap.
struct Capped {
    Vec value, slope;
};

// Coefficients of (1 - tanh(x) / x) / x^2 in x^2 for |x| <= 1, minimax in the relative error of tanh: 4.6e-9.
constexpr float kTanh[] = {0x1.55553cp-2f,  -0x1.110be2p-3f, 0x1.b96222p-5f,  -0x1.600992p-6f,
                           0x1.0460c2p-7f, -0x1.2da4f2p-9f, 0x1.77dd24p-12f};

// The value has nearly one rounding in all: where |z| <= cap it is z less a small part of z, elsewhere the cap less a
// part of it.
inline Capped soft_cap(Vec z, float cap) {
    constexpr float kMinus2Log2E = -2.8853900817779268f;
    const Vec x = z * (1.0f / cap), square = x * x;
    Vec less = broadcast(kTanh[6]);
    for (int i = 5; i >= 0; --i) less = multiply_add(less, square, broadcast(kTanh[i]));
    const Vec near = multiply_add(-z, less * square, z);

    const UIntVec sign = bit_cast<UIntVec>(z) & 0x80000000u;
    const Vec magnitude = bit_cast<Vec>(bit_cast<UIntVec>(x) ^ sign);
    const Vec e = scaled_exp2(magnitude * kMinus2Log2E, Power<5>(1.0f));  // exp(-2 |z / cap|)
    const Vec gap = 2.0f * e / (e + 1.0f);                                // 1 - |tanh|
    const Vec far = bit_cast<Vec>(bit_cast<UIntVec>(multiply_add(gap, broadcast(-cap), broadcast(cap))) | sign);
    return {magnitude < 1.0f ? near : far, gap * (2.0f - gap)};
}

}  // namespace repo::REPO_ISA
