// The kernels for AVX-512 with VNNI: four products of bytes per lane and instruction.
#if defined(__x86_64__)

#include "topk/cpu/avx512.hpp"

namespace valm {
namespace {

struct Codes {
    using Sum = Integers;
    static constexpr int kRows = 16, kWords = 1;
    __m512i bytes;

    explicit Codes(const uint8_t* p) : bytes(_mm512_loadu_si512(p)) {}
    void add(const int32_t* query, Sum& sum) const {
        sum.v = _mm512_dpbusd_epi32(sum.v, bytes, _mm512_set1_epi32(query[0]));
    }
};

}  // namespace

const Kernels kAvx512Vnni = {QueryLayout::kBytes,       12,       256, nullptr, nullptr,
                             pass<multiply<Codes, 12>>, pack_row, dot, exact};

}  // namespace valm

#endif
