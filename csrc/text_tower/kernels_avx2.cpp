// With AVX2: two products of 16-bit numbers per lane and instruction. AVX-512 without VNNI runs this too.
#if defined(__x86_64__)
#include <immintrin.h>

#include "text_tower/kernels.hpp"

namespace valm {
namespace {

// The sums of a tile of rows and outputs stay in registers.
constexpr int kNumbers = 16, kRows = 2, kOutputs = 4;

__m256i load(const int8_t* row) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row))); }

// The sum of each of four vectors.
__m128i sums_of(const __m256i* x) {
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}

template <int kSomeRows>
void multiply_rows(const int8_t* rows, int64_t width, const int8_t* weight, int64_t first, int64_t last,
                   int64_t outputs, int32_t* products) {
    for (int64_t n = first; n < last; n += kOutputs) {
        const int64_t some = last - n < kOutputs ? last - n : kOutputs;
        const int8_t* factor[kOutputs];
        for (int m = 0; m < kOutputs; ++m) factor[m] = weight + (n + (m < some ? m : 0)) * width;
        const int8_t* next = weight + (n + kOutputs) * width;  // prefetched, as in multiply_some_floats
        __m256i sums[kSomeRows][kOutputs] = {};
        int64_t e = 0;
        for (; e + kNumbers <= width; e += kNumbers) {
            __builtin_prefetch(next + e * kOutputs);
            __m256i factors[kOutputs];
            for (int m = 0; m < kOutputs; ++m) factors[m] = load(factor[m] + e);
            for (int i = 0; i < kSomeRows; ++i) {
                const __m256i row = load(rows + i * width + e);
                for (int m = 0; m < kOutputs; ++m)
                    sums[i][m] = _mm256_add_epi32(sums[i][m], _mm256_madd_epi16(row, factors[m]));
            }
        }
        for (int i = 0; i < kSomeRows; ++i) {
            int32_t found[kOutputs];
            _mm_storeu_si128(reinterpret_cast<__m128i*>(found), sums_of(sums[i]));
            for (int64_t m = 0; m < some; ++m) {
                for (int64_t rest = e; rest < width; ++rest) found[m] += rows[i * width + rest] * factor[m][rest];
                products[i * outputs + n + m] = found[m];
            }
        }
    }
}

void multiply_avx2(const int8_t* rows, int64_t count, int64_t width, const int8_t* weight, int64_t first, int64_t last,
                   int64_t outputs, int32_t* products) {
    for (; count >= kRows; count -= kRows, rows += kRows * width, products += kRows * outputs)
        multiply_rows<kRows>(rows, width, weight, first, last, outputs, products);
    if (count == 1) multiply_rows<1>(rows, width, weight, first, last, outputs, products);
}

}  // namespace

const TextTowerKernels text_tower_avx2 = {round_row, scale_row, multiply_avx2, multiply_floats,
                                          normalise, activate,  attend};

}  // namespace valm
#endif
