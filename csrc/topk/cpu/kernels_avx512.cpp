// The kernels for AVX-512 without VNNI: two products of 16-bit numbers per lane and instruction.
#if defined(__x86_64__)

#include "topk/cpu/avx512.hpp"

namespace valm {
namespace {

struct Codes {
    using Sum = Integers;
    static constexpr int kRows = 16, kWords = 2;
    __m512i even, odd;  // elements 0 and 2, 1 and 3, as the query's words

    explicit Codes(const uint8_t* p) {
        const __m512i bytes = _mm512_loadu_si512(p);
        even = _mm512_and_si512(bytes, _mm512_set1_epi32(0x00ff00ff));
        odd = _mm512_srli_epi16(bytes, 8);
    }
    void add(const int32_t* query, Sum& sum) const {
        sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(even, _mm512_set1_epi32(query[0])));
        sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(odd, _mm512_set1_epi32(query[1])));
    }
};

}  // namespace

const Kernels kAvx512 = {QueryLayout::kWords, 8, 256, nullptr, nullptr, pass<multiply<Codes, 8>>, pack_row, dot, exact};

}  // namespace valm

#endif
