// Vector operations of top-K search: bytes, bounds and sums in float64. Local to the including file, like
// simd/vector.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd/half.hpp"
#include "simd/vector.hpp"

namespace valm {
namespace {

template <typename Vector, typename T>
Vector load_vector(const T* p) {
    Vector result;
    std::memcpy(&result, p, sizeof(result));
    return result;
}

inline FloatVector load_floats(const float* p) { return load_vector<FloatVector>(p); }
inline void store_vector(float* p, FloatVector x) { std::memcpy(p, &x, sizeof(x)); }

inline FloatVector splat(float x) { return x - FloatVector{}; }  // x - 0 is x, for -0 too
inline FloatVector to_float(IntVector x) { return __builtin_convertvector(x, FloatVector); }
// Intrinsics here and below, because GCC 12 compiles the vector extension's widening lane by lane or through memory.
inline FloatVector to_float(ByteVector x) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bit_cast<__m128i>(x)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(x))));
#else
    return to_float(__builtin_convertvector(x, IntVector));
#endif
}

inline FloatVector abs_of(FloatVector x) { return bit_cast<FloatVector>(bit_cast<BitsVector>(x) & 0x7fffffffu); }
inline FloatVector larger_of(FloatVector a, FloatVector b) { return a > b ? a : b; }

// One bit per lane, set where a < b is false.
inline uint32_t not_below(FloatVector a, FloatVector b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ));
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpnlt_ps(a, b));
#else
    uint32_t mask = 0;
    for (int i = 0; i < Lanes<float>::count; ++i) mask |= static_cast<uint32_t>(!(a[i] < b[i])) << i;
    return mask;
#endif
}

// Rounds to integers c in [-127, 127] and writes c + 128 as bytes; returns c.
inline FloatVector round_to_bytes(FloatVector x, uint8_t* bytes) {
#if defined(__AVX512F__)
    const __m512i rounded = _mm512_cvtps_epi32(x);
    const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(shifted));
    return _mm512_cvtepi32_ps(rounded);
#elif defined(__AVX2__)
    const __m256i rounded = _mm256_cvtps_epi32(x);
    const __m256i shifted = _mm256_add_epi32(rounded, _mm256_set1_epi32(128));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(words, words));
    return _mm256_cvtepi32_ps(rounded);
#else
    FloatVector rounded = {};
    for (int i = 0; i < Lanes<float>::count; ++i) {
        rounded[i] = std::nearbyint(x[i]);
        bytes[i] = static_cast<uint8_t>(static_cast<int>(rounded[i]) + 128);
    }
    return rounded;
#endif
}

// The lower and the upper half of the floats, in float64.
inline DoubleVector lower_doubles(FloatVector x) {
#if defined(__AVX512F__)
    return _mm512_cvtps_pd(_mm512_castps512_ps256(x));
#elif defined(__AVX2__)
    return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
#else
    return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1), DoubleVector);
#endif
}
inline DoubleVector upper_doubles(FloatVector x) {
#if defined(__AVX512F__)
    return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
    return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
    return __builtin_convertvector(__builtin_shufflevector(x, x, 2, 3), DoubleVector);
#endif
}

// Adds the products of a and b, exact in float64, to the two vectors of sums.
inline void add_products(FloatVector a, FloatVector b, DoubleVector* sums) {
    sums[0] += lower_doubles(a) * lower_doubles(b);
    sums[1] += upper_doubles(a) * upper_doubles(b);
}

}  // namespace
}  // namespace valm
