// Vectors by their lanes: those that are filled in part, and sums over the lanes.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

// The first n < width entries of a vector; the rest becomes zero.
template <typename V> inline V first_of(V value, int n) {
    V kept{};
    std::memcpy(&kept, &value, n * sizeof(value[0]));
    return kept;
}

// Processors that take a mask do it in one instruction.
#if defined(__AVX512F__)
inline __mmask16 lanes_below(int n) { return __mmask16((1u << n) - 1); }
template <> inline Vec<float> load_part<float>(const float* from, int n) {
    return Vec<float>(_mm512_maskz_loadu_ps(lanes_below(n), from));
}
template <> inline void store_part<float>(float* to, Vec<float> value, int n) {
    _mm512_mask_storeu_ps(to, lanes_below(n), __m512(value));
}
template <> inline Vec<float> first_of(Vec<float> value, int n) {
    return Vec<float>(_mm512_maskz_mov_ps(lanes_below(n), __m512(value)));
}
#elif defined(__AVX2__)
inline __m256i lanes_below(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <> inline Vec<float> load_part<float>(const float* from, int n) {
    return Vec<float>(_mm256_maskload_ps(from, lanes_below(n)));
}
template <> inline void store_part<float>(float* to, Vec<float> value, int n) {
    _mm256_maskstore_ps(to, lanes_below(n), __m256(value));
}
template <> inline Vec<float> first_of(Vec<float> value, int n) {
    return Vec<float>(_mm256_and_ps(__m256(value), _mm256_castsi256_ps(lanes_below(n))));
}
#endif

// N lanes, halves of which are added to each other.
template <typename A, int N> struct Lanes {
    typedef A V __attribute__((vector_size(N * sizeof(A))));

    static inline __attribute__((always_inline)) A sum(V value) {
        if constexpr (N == 2) return value[0] + value[1];
        else {
            typename Lanes<A, N / 2>::V low, high;
            std::memcpy(&low, &value, sizeof low);
            std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
            return Lanes<A, N / 2>::sum(low + high);
        }
    }
};

template <typename A> inline A sum_lanes(Vec<A> value) { return Lanes<A, Simd<A>::width>::sum(value); }

}  // namespace
