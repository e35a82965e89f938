// Vectors of the width the translation unit is compiled for, in the compiler's own vector extensions.
// Everything here has internal linkage: the same names are compiled for several instruction sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace {

struct BFloat16 {
    uint16_t bits;
};

template <typename T> struct Simd;

template <> struct Simd<float> {
    static constexpr int width = VECTOR_BYTES / 4;
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t H __attribute__((vector_size(VECTOR_BYTES / 2)));
};

template <> struct Simd<double> {
    static constexpr int width = VECTOR_BYTES / 8;
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
};

template <typename T> using Vec = typename Simd<T>::V;

// The type sums are kept in, for a type that values are stored in.
template <typename S> struct Accumulator { using type = S; };
template <> struct Accumulator<BFloat16> { using type = float; };

template <typename A> inline Vec<A> splat(A value) { return value - Vec<A>{}; }

template <typename A> inline A widen(A value) { return value; }
inline float widen(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

template <typename S, typename A> inline S narrow(A value) { return value; }
template <> inline BFloat16 narrow<BFloat16, float>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <typename S> inline Vec<typename Accumulator<S>::type> load(const S* from) {
    Vec<S> out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
template <> inline Vec<float> load<BFloat16>(const BFloat16* from) {
    Simd<float>::H half;
    std::memcpy(&half, from, sizeof half);
    const Simd<float>::U bits = __builtin_convertvector(half, Simd<float>::U) << 16;
    Vec<float> out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

template <typename S> inline void store(S* to, Vec<typename Accumulator<S>::type> value) {
    std::memcpy(to, &value, sizeof value);
}
template <> inline void store<BFloat16>(BFloat16* to, Vec<float> value) {
    Simd<float>::U bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Simd<float>::U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Simd<float>::U quiet = (bits >> 16) | 0x40u;
    const Simd<float>::I is_nan = value != value;
    const Simd<float>::U chosen =
        (rounded & ~reinterpret_cast<const Simd<float>::U&>(is_nan)) | (quiet & reinterpret_cast<const Simd<float>::U&>(is_nan));
    const Simd<float>::H half = __builtin_convertvector(chosen, Simd<float>::H);
    std::memcpy(to, &half, sizeof half);
}

// The first n < width entries; the rest reads as zero, and is not touched by a store.
template <typename S> inline Vec<typename Accumulator<S>::type> load_part(const S* from, int n) {
    using A = typename Accumulator<S>::type;
    A lanes[Simd<A>::width] = {};
    for (int i = 0; i < n; ++i) lanes[i] = widen(from[i]);
    return load<A>(lanes);
}
template <typename S> inline void store_part(S* to, Vec<typename Accumulator<S>::type> value, int n) {
    using A = typename Accumulator<S>::type;
    A lanes[Simd<A>::width];
    store<A>(lanes, value);
    for (int i = 0; i < n; ++i) to[i] = narrow<S, A>(lanes[i]);
}

// The polynomial of x with these coefficients, that of the highest power first.
template <typename... Rest> inline Vec<float> polynomial(Vec<float> x, float first, Rest... rest) {
    Vec<float> p = splat(first);
    ((p = p * x + rest), ...);
    return p;
}

// exp(v) for v <= 0, relative error about 1e-7; 1e-38 and less become about 1e-38.
inline Vec<float> exp_negative(Vec<float> v) {
    const Vec<float> lowest = splat(-87.0f);
    v = v < lowest ? lowest : v;
    const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Vec<float> shifted = v * 1.44269504088896341f + magic;
    const Vec<float> n = shifted - magic;
    const Vec<float> r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec<float> p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f);
    p = p * (r * r) + r + 1.0f;
    Simd<float>::U bits, scale;
    std::memcpy(&bits, &shifted, sizeof bits);
    scale = bits << 23;
    std::memcpy(&bits, &p, sizeof bits);
    bits += scale;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

// GELU with the exact normal distribution function; erf as a rational minimax function on [-3.83, 3.83].
inline Vec<float> gelu(Vec<float> x) {
    const Vec<float> bound = splat(3.832506856900711f);
    Vec<float> z = x * 0.70710678118654752f;
    z = z > bound ? bound : z;
    z = z < -bound ? -bound : z;
    const Vec<float> s = z * z;
    const Vec<float> p = polynomial(s, 0.00022905065861350646f, 0.0034082910107109506f, 0.050955695062380861f,
                                    0.18520832239976145f, 1.128379143519084f);
    const Vec<float> q = polynomial(s, -1.1791602954361697e-7f, 0.000023547966471313185f, 0.0010179625278914885f,
                                    0.014070470171167667f, 0.11098505178285362f, 0.49746925110067538f, 1.0f);
    const Vec<float> half = 0.5f * x;
    return half + half * (z * p / q);
}

// GELU and its derivative: Phi(x) and phi(x) share one exponential.
// Phi(-|x|) = exp(-x^2/2) * Q(1 / (1 + 0.35 |x|)), Q a minimax polynomial of relative error 3.2e-8 for |x| < 14.
inline Vec<float> gelu(Vec<float> x, Vec<float>* derivative) {
    const Vec<float> magnitude = x < 0.0f ? -x : x;
    const Vec<float> t = 1.0f / (1.0f + 0.35f * magnitude);
    const Vec<float> q = polynomial(t, -0.02914625973f, 0.1439732583f, -0.2557173755f, 0.1591775882f, -0.02311208494f,
                                    0.1055089027f, 0.1198326555f, 0.1398618966f, 0.1396214029f);
    const Vec<float> e = exp_negative(-0.5f * x * x);
    const Vec<float> tail = e * (q * t);
    const Vec<float> cdf = x < 0.0f ? tail : 1.0f - tail;
    *derivative = cdf + x * e * 0.398942280401432678f;
    return x * cdf;
}

inline Vec<double> gelu(Vec<double> x, Vec<double>* derivative = nullptr) {
    double in[Simd<double>::width], out[Simd<double>::width], slope[Simd<double>::width];
    store<double>(in, x);
    for (int i = 0; i < Simd<double>::width; ++i) {
        const double cdf = 0.5 * std::erfc(-in[i] * 0.70710678118654752440);
        out[i] = in[i] * cdf;
        slope[i] = cdf + in[i] * std::exp(-0.5 * in[i] * in[i]) * 0.398942280401432677940;
    }
    if (derivative) *derivative = load<double>(slope);
    return load<double>(out);
}

}  // namespace
