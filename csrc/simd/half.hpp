// 16-bit floats to float32 and back, one by one and by vectors. The functions are local to the including
// file, like simd/vector.hpp.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd/vector.hpp"

namespace valm {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

namespace {

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
    // a product corrects the exponent's bias, and also normalises denormal numbers
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = magnitude < 0x0f800000u ? bits : magnitude | 0x7f800000u;  // infinity and NaN
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bfloat_to_float(uint16_t bfloat) {
    const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Intrinsics, because GCC 12 compiles the vector extension's widening in halves.
inline BitsVector widen_bits(HalfBitsVector x) {
#if defined(__AVX512F__)
    return bit_cast<BitsVector>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(x)));
#elif defined(__AVX2__)
    return bit_cast<BitsVector>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
#else
    return __builtin_convertvector(x, BitsVector);
#endif
}

inline FloatVector widen_bfloat16(HalfBitsVector x) { return bit_cast<FloatVector>(widen_bits(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline HalfBitsVector narrow_bfloat16(FloatVector x) {
    const BitsVector bits = bit_cast<BitsVector>(x);
    const BitsVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const BitsVector nan = bit_cast<BitsVector>(x != x);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), HalfBitsVector);
}

#if defined(__AVX512F__)
inline FloatVector widen_float16(HalfBitsVector x) {
    return bit_cast<FloatVector>(_mm512_cvtph_ps(bit_cast<__m256i>(x)));
}
inline HalfBitsVector narrow_float16(FloatVector x) {
    return bit_cast<HalfBitsVector>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline FloatVector widen_float16(HalfBitsVector x) {
    return bit_cast<FloatVector>(_mm256_cvtph_ps(bit_cast<__m128i>(x)));
}
inline HalfBitsVector narrow_float16(FloatVector x) {
    return bit_cast<HalfBitsVector>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline FloatVector widen_float16(HalfBitsVector half) {
    const BitsVector x = widen_bits(half);
    const BitsVector magnitude = x & 0x7fffu;
    // A product raises the exponent's bias from 15 to 127, and also turns subnormals into normal numbers.
    const FloatVector scaled = bit_cast<FloatVector>(magnitude << 13) * 0x1p112f;
    const BitsVector infinite = bit_cast<BitsVector>(magnitude >= 0x7c00u) & 0x7f800000u;
    return bit_cast<FloatVector>(bit_cast<BitsVector>(scaled) | infinite | ((x & 0x8000u) << 16));
}
inline HalfBitsVector narrow_float16(FloatVector value) {
    const BitsVector x = bit_cast<BitsVector>(value);
    const BitsVector magnitude = x & 0x7fffffffu;
    // Normal results: drop 13 bits, ties to even. Subnormal ones: adding 0.5 leaves the rounded bits at the end.
    const BitsVector normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const BitsVector subnormal = bit_cast<BitsVector>(bit_cast<FloatVector>(magnitude) + 0.5f) - 0x3f000000u;
    const BitsVector small = bit_cast<BitsVector>(magnitude < (113u << 23));
    const BitsVector large = bit_cast<BitsVector>(magnitude >= 0x477ff000u);  // rounds to 65536 or more
    const BitsVector nan = bit_cast<BitsVector>(value != value);
    BitsVector half = (subnormal & small) | (normal & ~small);
    half = (0x7c00u & large) | (half & ~large);
    half = (0x7e00u & nan) | (half & ~nan);
    return __builtin_convertvector(half | ((x >> 16) & 0x8000u), HalfBitsVector);
}
#endif

}  // namespace
}  // namespace valm
