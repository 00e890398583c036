// The kernels for AVX2 with FMA and F16C: two products of 16-bit numbers a lane and instruction.
#if defined(__x86_64__)

#include <immintrin.h>

#include "topk/kernels.hpp"

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
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    friend Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
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

// Sixteen rows, half of a panel: two registers of sums a query, and four of codes.
template <int kQueries>
void pass_half(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, int half, Kept& kept) {
    const __m256i bytes_0_and_2 = _mm256_set1_epi32(0x00ff00ff);
    __m256i sums[kQueries][2];
    for (int j = 0; j < kQueries; ++j) sums[j][0] = sums[j][1] = _mm256_set1_epi32(tile.start[j]);
    const int32_t* g = static_cast<const int32_t*>(tile.codes);  // pairs: elements 0 and 2, then 1 and 3
    for (int64_t step = 0; step < steps; ++step, g += kQueries * 2) {
        const uint8_t* rows = codes + step * kPanelRows * 4 + half * 64;
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + 32));
        const __m256i even[2] = {_mm256_and_si256(low, bytes_0_and_2), _mm256_and_si256(high, bytes_0_and_2)};
        const __m256i odd[2] = {_mm256_srli_epi16(low, 8), _mm256_srli_epi16(high, 8)};
        for (int j = 0; j < kQueries; ++j) {
            const __m256i g_even = _mm256_set1_epi32(g[j * 2]), g_odd = _mm256_set1_epi32(g[j * 2 + 1]);
            for (int i = 0; i < 2; ++i) {
                sums[j][i] = _mm256_add_epi32(sums[j][i], _mm256_madd_epi16(even[i], g_even));
                sums[j][i] = _mm256_add_epi32(sums[j][i], _mm256_madd_epi16(odd[i], g_odd));
            }
        }
    }
    for (int j = 0; j < kQueries; ++j) {
        for (int i = 0; i < 2; ++i) {
            const int first = half * 16 + i * 8;
            const float* rows = stats + first;
            __m256 upper = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[j][i]), _mm256_loadu_ps(rows + kStep * kPanelRows));
            upper = _mm256_fmadd_ps(_mm256_set1_ps(tile.along[j]), _mm256_loadu_ps(rows + kAlong * kPanelRows), upper);
            upper =
                _mm256_fmadd_ps(_mm256_set1_ps(tile.length[j]), _mm256_loadu_ps(rows + kLength * kPanelRows), upper);
            upper = _mm256_fmadd_ps(_mm256_set1_ps(tile.error[j]), _mm256_loadu_ps(rows + kError * kPanelRows), upper);
            const __m256 bits = _mm256_cmp_ps(upper, _mm256_set1_ps(tile.theta[j]), _CMP_NLT_UQ);
            kept.mask[j] |= static_cast<uint32_t>(_mm256_movemask_ps(bits)) << first;
            _mm256_storeu_ps(kept.upper[j] + first, upper);
        }
    }
}

template <int kQueries>
uint32_t pass_tile(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    for (int j = 0; j < kQueries; ++j) kept.mask[j] = 0;
    pass_half<kQueries>(codes, stats, steps, tile, 0, kept);
    pass_half<kQueries>(codes, stats, steps, tile, 1, kept);
    uint32_t kept_queries = 0;
    for (int j = 0; j < kQueries; ++j) kept_queries |= static_cast<uint32_t>(kept.mask[j] != 0) << j;
    return kept_queries;
}

uint32_t pass(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    switch (tile.count) {
        case 1:
            return pass_tile<1>(codes, stats, steps, tile, kept);
        case 2:
            return pass_tile<2>(codes, stats, steps, tile, kept);
        case 3:
            return pass_tile<3>(codes, stats, steps, tile, kept);
        default:
            return pass_tile<4>(codes, stats, steps, tile, kept);
    }
}

}  // namespace

const Kernels kAvx2 = {"avx2", false, 4, pass, pack_row<Vector>, dot<Vector>, exact<Vector>};

}  // namespace valm

#endif
