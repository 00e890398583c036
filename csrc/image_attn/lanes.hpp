// Vectors of the widest registers that the including file is compiled for, by the compiler's vector extension, and
// the rows of 16-bit numbers read into them. Everything is local to the including file: each instruction set has its
// own copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "image_attn/problem.hpp"

namespace valm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t BitsVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBitsVector __attribute__((vector_size(kVectorBytes / 2)));

template <typename Wide>
struct Lanes;
template <>
struct Lanes<float> {
    using Vector = FloatVector;
    static constexpr int count = kVectorBytes / 4;
};
template <>
struct Lanes<double> {
    using Vector = DoubleVector;
    static constexpr int count = kVectorBytes / 8;
};

template <typename To, typename From>
To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline FloatVector widen_bfloat16(HalfBitsVector x) {
    return bit_cast<FloatVector>(__builtin_convertvector(x, BitsVector) << 16);
}

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
    const BitsVector x = __builtin_convertvector(half, BitsVector);
    const BitsVector magnitude = x & 0x7fffu;
    // The exponent's bias goes from 15 to 127 by a product, which turns subnormals into normal numbers on the way.
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

// An array of n zeros. (std::vector would bring functions that all instruction sets share under one name, and the
// linker might keep the copy that was compiled for another machine.)
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t n) : data_(new T[n]()), size_(n) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { delete[] data_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return size_; }

  private:
    T* data_;
    int64_t size_;
};

// How a T is held in memory, and its conversion to and from a vector of sums.
template <typename T>
struct Element {
    using Wide = T;
    using Memory = typename Lanes<T>::Vector;
    static Memory widen(Memory x) { return x; }
    static Memory narrow(Memory x) { return x; }
};
template <>
struct Element<BFloat16> {
    using Wide = float;
    using Memory = HalfBitsVector;
    static FloatVector widen(Memory x) { return widen_bfloat16(x); }
    static Memory narrow(FloatVector x) { return narrow_bfloat16(x); }
};
template <>
struct Element<Float16> {
    using Wide = float;
    using Memory = HalfBitsVector;
    static FloatVector widen(Memory x) { return widen_float16(x); }
    static Memory narrow(FloatVector x) { return narrow_float16(x); }
};

// Around the caches, for outputs that are larger than them; p is aligned to the stored vector.
template <typename T>
void store_around_caches(T* p, typename Lanes<typename Element<T>::Wide>::Vector x) {
    const typename Element<T>::Memory memory = Element<T>::narrow(x);
#if defined(__AVX512F__)
    if constexpr (sizeof(memory) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(memory));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(memory) == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(memory));
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(memory) == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(memory));
    if constexpr (sizeof(memory) == 8) std::memcpy(p, &memory, sizeof(memory));
#else
    std::memcpy(p, &memory, sizeof(memory));
#endif
}

// To be called by a thread after its last store_around_caches.
inline void finish_stores_around_caches() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The first n elements from p, zeros behind them.
template <typename T>
typename Lanes<typename Element<T>::Wide>::Vector load(const T* p, int64_t n) {
    typename Element<T>::Memory memory = {};
    if (n >= Lanes<typename Element<T>::Wide>::count) {
        std::memcpy(&memory, p, sizeof(memory));
    } else {
        std::memcpy(&memory, p, n * sizeof(T));
    }
    return Element<T>::widen(memory);
}

template <typename T>
void store(T* p, typename Lanes<typename Element<T>::Wide>::Vector x, int64_t n) {
    const typename Element<T>::Memory memory = Element<T>::narrow(x);
    if (n >= Lanes<typename Element<T>::Wide>::count) {
        std::memcpy(p, &memory, sizeof(memory));
    } else {
        std::memcpy(p, &memory, n * sizeof(T));
    }
}

// exp of numbers up to about 0, to 2 units in the last place; 0 below 2^-126, NaN of NaN.
inline FloatVector exp_of(FloatVector x) {
    const FloatVector shift = FloatVector{} + 0x1.8p23f;  // rounds to an integer and leaves it in the last bits
    const FloatVector shifted = x * 0x1.715476p0f + shift;
    const FloatVector n = shifted - shift;
    const FloatVector r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n ln 2, with ln 2 in two parts
    FloatVector e = FloatVector{} + 0x1.a01a02p-13f;                     // the Taylor series to r^7 / 7!
    for (const float c : {0x1.6c16c2p-10f, 0x1.111112p-7f, 0x1.555556p-5f, 0x1.555556p-3f, 0.5f, 1.0f, 1.0f})
        e = e * r + c;
    const BitsVector power = (bit_cast<BitsVector>(shifted) << 23) + 0x3f800000u;  // 2^n
    const BitsVector tiny = bit_cast<BitsVector>(x <= -87.3f);
    return bit_cast<FloatVector>(bit_cast<BitsVector>(e * bit_cast<FloatVector>(power)) & ~tiny);
}

inline DoubleVector exp_of(DoubleVector x) {
    for (int i = 0; i < Lanes<double>::count; ++i) x[i] = std::exp(x[i]);
    return x;
}

// The sum of all lanes, by halves.
inline float sum_of(FloatVector x) {
#if defined(__AVX512F__)
    const auto eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const auto eight = x;
#endif
#if defined(__AVX2__)
    const auto four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
    const auto four = eight;
#endif
    const auto two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
    return two[0] + two[1];
}

inline double sum_of(DoubleVector x) {
    double total = x[0];
    for (int i = 1; i < Lanes<double>::count; ++i) total += x[i];
    return total;
}

}  // namespace
}  // namespace valm
