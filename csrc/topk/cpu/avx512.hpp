// Sixteen floats in an AVX-512 register, for the files compiled for it.
#pragma once

#include <immintrin.h>

#include "topk/cpu/kernels.hpp"

namespace valm {
namespace {

struct Vector {
    static constexpr int kWidth = 16;
    __m512 v;

    struct Doubles {
        static constexpr int kWidth = 8;
        __m512d v;
    };

    static Vector all(float value) { return {_mm512_set1_ps(value)}; }
    static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vector load_half(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vector load_bfloat(const uint16_t* p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
    }
    static Vector load_byte(const int8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
    }
    static Vector load_int(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    friend Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
    // A bit for each lane where not a < b.
    static uint32_t not_below(Vector a, Vector b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }
    Vector abs() const { return {_mm512_abs_ps(v)}; }
    float largest() const { return _mm512_reduce_max_ps(v); }
    float sum() const { return _mm512_reduce_add_ps(v); }
    Vector round_to_bytes(uint8_t* bytes) const {
        const __m512i rounded = _mm512_cvtps_epi32(v);
        const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(shifted));
        return {_mm512_cvtepi32_ps(rounded)};
    }
    static void add_products(Vector a, Vector b, Doubles* sums) {
        sums[0].v = _mm512_fmadd_pd(low(a), low(b), sums[0].v);
        sums[1].v = _mm512_fmadd_pd(high(a), high(b), sums[1].v);
    }

  private:
    static __m512d low(Vector a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)); }
    static __m512d high(Vector a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)); }
};

// Sixteen 32-bit sums.
struct Integers {
    __m512i v;

    static Integers all(int32_t value) { return {_mm512_set1_epi32(value)}; }
    void store(int32_t* p) const { _mm512_store_si512(p, v); }
};

}  // namespace
}  // namespace valm
