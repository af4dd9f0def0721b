// Converts between logits in memory and pairs of float vectors, rounding to nearest even unless stated otherwise.
//
// The two vectors of a pair hold 2 kWidth elements in the order that is cheapest for the type; see element_of.
#pragma once

#include "kernels/simd.h"

namespace repo::REPO_ISA {

struct Pair {
    Vec first, second;
};

constexpr int kPair = 2 * kWidth;

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

constexpr float negative_infinity(const float*) { return -__builtin_inff(); }
constexpr BFloat16 negative_infinity(const BFloat16*) { return {0xff80}; }
constexpr Float16 negative_infinity(const Float16*) { return {0xfc00}; }

inline Pair load_pair(const float* from) { return {load_bits<Vec>(from), load_bits<Vec>(from + kWidth)}; }

inline void store_pair(float* to, Pair x) {
    store_bits(to, x.first);
    store_bits(to + kWidth, x.second);
}

// bfloat16 is the upper half of a float: even elements go into the first vector, odd ones into the second.
inline Pair load_pair(const BFloat16* from) {
    const UIntVec bits = load_bits<UIntVec>(from);
    return {bit_cast<Vec>(bits << 16), bit_cast<Vec>(bits & 0xffff0000u)};
}

inline UIntVec round_to_upper_half(Vec x) {
    const UIntVec bits = bit_cast<UIntVec>(x);
    return bits + ((bits >> 16 & 1) + 0x7fff);
}

inline UIntVec to_bfloat16(Pair x) {
    return round_to_upper_half(x.first) >> 16 | (round_to_upper_half(x.second) & 0xffff0000u);
}

// Replaces NaN by one without a payload: a full lower half would round up and overflow into -0. A NaN from bfloat16
// logits has an empty lower half.
inline Vec plain_nan(Vec x) { return x == x ? x : broadcast(__builtin_nanf("")); }

inline void store_pair(BFloat16* to, Pair x) { store_bits(to, to_bfloat16(x)); }

// Rounds to the nearest value, ties away from 0, in a third of the instructions that ties to even take. It is meant for
// values that carry rounding errors already.
inline UIntVec to_nearby_bfloat16(Pair x) {
    const UIntVec first = bit_cast<UIntVec>(x.first) + 0x8000, second = bit_cast<UIntVec>(x.second) + 0x8000;
    return first >> 16 | (second & 0xffff0000u);
}

#if defined(__AVX512F__)
inline Vec from_float16(const Float16* from) { return _mm512_cvtph_ps(load_bits<__m256i>(from)); }
inline HalfVec to_float16(Vec x) { return bit_cast<HalfVec>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
inline Vec from_float16(const Float16* from) { return _mm256_cvtph_ps(load_bits<__m128i>(from)); }
inline HalfVec to_float16(Vec x) { return bit_cast<HalfVec>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Vec from_float16(const Float16* from) {
    const UIntVec half = __builtin_convertvector(load_bits<HalfVec>(from), UIntVec);
    const UIntVec magnitude = half & 0x7fff;
    // exponent bias 15 -> 127 by a product, which is exact for subnormals too
    const Vec finite = bit_cast<Vec>(magnitude << 13) * 0x1p112f;
    const UIntVec special = (magnitude << 13) | 0x7f800000u;
    const UIntVec bits = magnitude >= 0x7c00 ? special : bit_cast<UIntVec>(finite);
    return bit_cast<Vec>(bits | (half & 0x8000) << 16);
}

inline HalfVec to_float16(Vec x) {
    const UIntVec bits = bit_cast<UIntVec>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const UIntVec normal = (magnitude - (112u << 23) + ((magnitude >> 13 & 1) + 0xfff)) >> 13;
    // below 2^-14 the spacing is 2^-24, as that of floats at 1/2: adding 1/2 rounds to it
    const UIntVec subnormal = bit_cast<UIntVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
    UIntVec half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? UIntVec{} + 0x7c00 : half;
    half = magnitude > 0x7f800000u ? UIntVec{} + 0x7e00 : half;
    return __builtin_convertvector(half | sign, HalfVec);
}
#endif

inline Pair load_pair(const Float16* from) { return {from_float16(from), from_float16(from + kWidth)}; }

inline void store_pair(Float16* to, Pair x) {
    store_bits(to, to_float16(x.first));
    store_bits(to + kWidth, to_float16(x.second));
}

// Stores computed values to memory that is aligned to a vector; past the caches with kStream.
template <bool kStream>
inline void put_pair(float* to, Pair x) {
    if (!kStream) return store_pair(to, x);
    stream(to, x.first);
    stream(to + kWidth, x.second);
}

template <bool kStream>
inline void put_pair(BFloat16* to, Pair x) {
    const UIntVec bits = to_nearby_bfloat16(x);
    if (!kStream) return store_bits(to, bits);
    stream(reinterpret_cast<float*>(to), bit_cast<Vec>(bits));
}

template <bool kStream>
inline void put_pair(Float16* to, Pair x) {
    if (!kStream) return store_pair(to, x);
    stream(&to->bits, to_float16(x.first));
    stream(&to[kWidth].bits, to_float16(x.second));
}

// Returns which element of a pair is in `lane` of its first (0) or second (1) vector.
inline int64_t element_of(const BFloat16*, int vector, int lane) { return 2 * lane + vector; }

template <class T>
inline int64_t element_of(const T*, int vector, int lane) {
    return vector * kWidth + lane;
}

// Loads the first `count` <= kPair elements; the others are 0.
template <class T>
inline Pair load_first(const T* from, int64_t count) {
    T elements[kPair] = {};
    std::memcpy(elements, from, count * sizeof(T));
    return load_pair(elements);
}

template <class T>
inline void store_first(T* to, int64_t count, Pair x) {
    T elements[kPair];
    store_pair(elements, x);
    std::memcpy(to, elements, count * sizeof(T));
}

}  // namespace repo::REPO_ISA
