// With VNNI: four products of bytes per lane and instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include "text_tower/kernels.hpp"

namespace valm {
namespace {

constexpr int kBytes = 64, kRows = 4, kOutputs = 4;

// The numbers e, e + 1, ... of a row of `width`, padded with zeros.
__m512i load(const int8_t* row, int64_t e, int64_t width) {
    const __mmask64 inside = width - e < kBytes ? (uint64_t{1} << (width - e)) - 1 : ~uint64_t{0};
    return _mm512_maskz_loadu_epi8(inside, row + e);
}

// The sum of each of four vectors.
__m128i sums_of(const __m512i* x) {
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
}

// One factor of the instruction is unsigned. So 128 is added to the weights, by flipping their sign bits, and 128 times
// the sum of a row must be subtracted from each of its products.
template <int kSomeRows>
void multiply_rows(const int8_t* rows, int64_t width, const int8_t* weight, int64_t first, int64_t last,
                   int64_t outputs, int32_t* products) {
    const __m512i sign = _mm512_set1_epi8(-128);
    int32_t excess[kSomeRows];
    for (int i = 0; i < kSomeRows; ++i) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t e = 0; e < width; e += kBytes)
            sum = _mm512_dpbusd_epi32(sum, sign, load(rows + i * width, e, width));
        excess[i] = _mm512_reduce_add_epi32(sum);
    }
    for (int64_t n = first; n < last; n += kOutputs) {
        const int64_t some = last - n < kOutputs ? last - n : kOutputs;
        const int8_t* next = weight + (n + kOutputs) * width;  // prefetched, as in multiply_some_floats
        __m512i sums[kSomeRows][kOutputs] = {};
        for (int64_t e = 0; e < width; e += kBytes) {
            __m512i factors[kOutputs];
            for (int m = 0; m < kOutputs; ++m) {
                const int8_t* factor = weight + (n + (m < some ? m : 0)) * width;
                __builtin_prefetch(next + e * kOutputs + m * kBytes);
                factors[m] = _mm512_xor_si512(load(factor, e, width), sign);
            }
            for (int i = 0; i < kSomeRows; ++i) {
                const __m512i row = load(rows + i * width, e, width);
                for (int m = 0; m < kOutputs; ++m) sums[i][m] = _mm512_dpbusd_epi32(sums[i][m], factors[m], row);
            }
        }
        const __mmask8 wanted = static_cast<__mmask8>((1 << some) - 1);
        for (int i = 0; i < kSomeRows; ++i) {
            const __m128i found = _mm_sub_epi32(sums_of(sums[i]), _mm_set1_epi32(excess[i]));
            _mm_mask_storeu_epi32(products + i * outputs + n, wanted, found);
        }
    }
}

void multiply_vnni(const int8_t* rows, int64_t count, int64_t width, const int8_t* weight, int64_t first, int64_t last,
                   int64_t outputs, int32_t* products) {
    for (; count >= kRows; count -= kRows, rows += kRows * width, products += kRows * outputs)
        multiply_rows<kRows>(rows, width, weight, first, last, outputs, products);
    if (count == 3) multiply_rows<3>(rows, width, weight, first, last, outputs, products);
    if (count == 2) multiply_rows<2>(rows, width, weight, first, last, outputs, products);
    if (count == 1) multiply_rows<1>(rows, width, weight, first, last, outputs, products);
}

}  // namespace

const TextTowerKernels text_tower_avx512vnni = {round_row, scale_row, multiply_vnni, multiply_floats,
                                                normalise, activate,  attend};

}  // namespace valm
#endif
