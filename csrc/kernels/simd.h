// Vectors of the widest float registers of one instruction set.
//
// The row kernels are compiled once per instruction set, each time with another REPO_ISA as the namespace of everything
// they use. They must not call inline functions of the standard library: the linker keeps one copy of those, and it
// could be one with instructions that this machine does not have.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace repo::REPO_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef double DoubleVec __attribute__((vector_size(8 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UIntVec __attribute__((vector_size(4 * kWidth)));
typedef int16_t ShortVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));

// Subtracts the zeros, since x - 0 is x for every x and costs nothing; x + 0 is not -0 for -0, which costs an addition.
inline Vec broadcast(float x) { return x - Vec{}; }

template <class V, class T>
inline V load_bits(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <class V, class T>
inline void store_bits(T* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

#if defined(__aarch64__)
inline Vec vec_fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kWidth; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
}
#endif

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Returns the number of elements before the first 64-byte line that begins at or after `from`.
template <class T>
inline int64_t to_line(const T* from) {
    return (64 - reinterpret_cast<uintptr_t>(from) % 64) % 64 / sizeof(T);
}

// Returns a where a > b, else b; b where either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline ShortVec larger(ShortVec a, ShortVec b) { return a > b ? a : b; }
inline ShortVec smaller(ShortVec a, ShortVec b) { return a < b ? a : b; }

// Returns a b + c with one rounding or two, whichever is cheaper.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vec_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// Returns a b - c with one rounding. Without such an instruction it is computed in double, where the product of two
// floats is exact.
inline Vec exact_multiply_subtract(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmsub_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmsub_ps(a, b, c);
#elif defined(__aarch64__)
    return vec_fma(a, b, -c);
#else
    const DoubleVec product = __builtin_convertvector(a, DoubleVec) * __builtin_convertvector(b, DoubleVec);
    return __builtin_convertvector(product - __builtin_convertvector(c, DoubleVec), Vec);
#endif
}

template <class T, int kLanes>
struct VectorOf {
    typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};

// Combines the lanes of a vector by halves, in an order that is the same for every row.
template <class T, int kLanes, class Combine>
inline T fold(typename VectorOf<T, kLanes>::type v, Combine combine) {
    if constexpr (kLanes == 1) {
        return v[0];
    } else {
        typename VectorOf<T, kLanes / 2>::type half[2];
        std::memcpy(half, &v, sizeof v);
        return fold<T, kLanes / 2>(combine(half[0], half[1]), combine);
    }
}

inline float sum_lanes(Vec v) {
    return fold<float, kWidth>(v, [](auto a, auto b) { return a + b; });
}

inline int32_t sum_lanes(IntVec v) {
    return fold<int32_t, kWidth>(v, [](auto a, auto b) { return a + b; });
}

inline float max_lanes(Vec v) {
    return fold<float, kWidth>(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline int16_t max_lanes(ShortVec v) {
    return fold<int16_t, 2 * kWidth>(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline int16_t min_lanes(ShortVec v) {
    return fold<int16_t, 2 * kWidth>(v, [](auto a, auto b) { return a < b ? a : b; });
}

// Stores past the caches, for lines that are written whole and not read again soon; `to` is aligned to the vector.
// An instruction set without such a store uses an ordinary one.
inline void stream(float* to, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, v);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, v);
#elif defined(__SSE2__)
    _mm_stream_ps(to, v);
#else
    store_bits(to, v);
#endif
}

inline void stream(uint16_t* to, HalfVec v) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(v));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(v));
#else
    store_bits(to, v);
#endif
}

// Orders streamed stores before what the thread does next.
inline void fence_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace repo::REPO_ISA
