// The kernels for AVX2 with FMA and F16C: two products of 16-bit numbers a lane and instruction.
#if defined(__x86_64__)

#include <immintrin.h>

#include "topk/cpu/kernels.hpp"

namespace valm {
namespace {

struct Vector {
    static constexpr int kWidth = 8;
    __m256 v;

    struct Doubles {
        static constexpr int kWidth = 4;
        __m256d v;
    };

    static Vector all(float value) { return {_mm256_set1_ps(value)}; }
    static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vector load_half(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static Vector load_bfloat(const uint16_t* p) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
    }
    static Vector load_byte(const int8_t* p) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
    }
    static Vector load_int(const int32_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    friend Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
    // A bit for each lane where not a < b.
    static uint32_t not_below(Vector a, Vector b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)); }
    Vector abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
    float largest() const {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    float sum() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    Vector round_to_bytes(uint8_t* bytes) const {
        const __m256i rounded = _mm256_cvtps_epi32(v);
        const __m256i shifted = _mm256_add_epi32(rounded, _mm256_set1_epi32(128));
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(words, words));
        return {_mm256_cvtepi32_ps(rounded)};
    }
    static void add_products(Vector a, Vector b, Doubles* sums) {
        sums[0].v = _mm256_fmadd_pd(low(a), low(b), sums[0].v);
        sums[1].v = _mm256_fmadd_pd(high(a), high(b), sums[1].v);
    }

  private:
    static __m256d low(Vector a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)); }
    static __m256d high(Vector a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)); }
};

struct Codes {
    struct Sum {
        __m256i v;

        static Sum all(int32_t value) { return {_mm256_set1_epi32(value)}; }
        void store(int32_t* p) const { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
    };
    static constexpr int kRows = 8, kWords = 2;
    __m256i even, odd;  // elements 0 and 2, 1 and 3, as the query's words

    explicit Codes(const uint8_t* p) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        even = _mm256_and_si256(bytes, _mm256_set1_epi32(0x00ff00ff));
        odd = _mm256_srli_epi16(bytes, 8);
    }
    void add(const int32_t* query, Sum& sum) const {
        sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(even, _mm256_set1_epi32(query[0])));
        sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(odd, _mm256_set1_epi32(query[1])));
    }
};

}  // namespace

const Kernels kAvx2 = {"avx2", false, 4, pass<Vector, Codes, 4>, pack_row<Vector>, dot<Vector>, exact<Vector>};

}  // namespace valm

#endif
