// The kernels for AVX2 with FMA and F16C: two products of 16-bit numbers per lane and instruction.
#if defined(__x86_64__)

#include <immintrin.h>

#include "topk/cpu/kernels.hpp"

namespace valm {
namespace {

struct Codes {
    struct Sum {
        __m256i v;

        static Sum zero() { return {_mm256_setzero_si256()}; }
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

const Kernels kAvx2 = {QueryLayout::kWords, 4, 256, nullptr, nullptr, pass<multiply<Codes, 4>>, pack_row, dot, exact};

}  // namespace valm

#endif
