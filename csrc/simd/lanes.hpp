// Vector operations of kernels: reading and writing rows of any dtype, and exp. Local to the including file, like
// simd/vector.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd/half.hpp"
#include "simd/vector.hpp"

namespace valm {
namespace {

// An array of n zeros. (Functions of std::vector have the same name for all instruction sets, and the linker might keep
// the copy that was compiled for another machine.)
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
struct InMemory {
    using Wide = T;
    using Memory = typename Lanes<T>::Vector;
    static Memory widen(Memory x) { return x; }
    static Memory narrow(Memory x) { return x; }
};
template <>
struct InMemory<BFloat16> {
    using Wide = float;
    using Memory = HalfBitsVector;
    static FloatVector widen(Memory x) { return widen_bfloat16(x); }
    static Memory narrow(FloatVector x) { return narrow_bfloat16(x); }
};
template <>
struct InMemory<Float16> {
    using Wide = float;
    using Memory = HalfBitsVector;
    static FloatVector widen(Memory x) { return widen_float16(x); }
    static Memory narrow(FloatVector x) { return narrow_float16(x); }
};

// Writes around the caches, for outputs that exceed them; p is aligned to the stored vector.
template <typename T>
void store_around_caches(T* p, typename Lanes<typename InMemory<T>::Wide>::Vector x) {
    const typename InMemory<T>::Memory memory = InMemory<T>::narrow(x);
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

// A thread must call it after its last store_around_caches.
inline void finish_stores_around_caches() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The first n elements from p, padded with zeros.
template <typename T>
typename Lanes<typename InMemory<T>::Wide>::Vector load(const T* p, int64_t n) {
    typename InMemory<T>::Memory memory = {};
    if (n >= Lanes<typename InMemory<T>::Wide>::count) {
        std::memcpy(&memory, p, sizeof(memory));
    } else {
        std::memcpy(&memory, p, n * sizeof(T));
    }
    return InMemory<T>::widen(memory);
}

template <typename T>
void store(T* p, typename Lanes<typename InMemory<T>::Wide>::Vector x, int64_t n) {
    const typename InMemory<T>::Memory memory = InMemory<T>::narrow(x);
    if (n >= Lanes<typename InMemory<T>::Wide>::count) {
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

}  // namespace
}  // namespace valm
