// The kernels for AVX-512 without VNNI: two products of 16-bit numbers a lane and instruction.
#if defined(__x86_64__)

#include "topk/avx512.hpp"

namespace valm {
namespace {

template <int kQueries>
uint32_t pass_tile(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    const __m512i bytes_0_and_2 = _mm512_set1_epi32(0x00ff00ff);
    __m512i sums[kQueries][2];
#pragma GCC unroll 12
    for (int j = 0; j < kQueries; ++j) sums[j][0] = sums[j][1] = _mm512_set1_epi32(tile.start[j]);
    const int32_t* g = static_cast<const int32_t*>(tile.codes);  // pairs: elements 0 and 2, then 1 and 3
    for (int64_t step = 0; step < steps; ++step, codes += kPanelRows * 4, g += kQueries * 2) {
        const __m512i low = _mm512_loadu_si512(codes);
        const __m512i high = _mm512_loadu_si512(codes + 64);
        const __m512i even[2] = {_mm512_and_si512(low, bytes_0_and_2), _mm512_and_si512(high, bytes_0_and_2)};
        const __m512i odd[2] = {_mm512_srli_epi16(low, 8), _mm512_srli_epi16(high, 8)};
#pragma GCC unroll 12
        for (int j = 0; j < kQueries; ++j) {
            const __m512i g_even = _mm512_set1_epi32(g[j * 2]), g_odd = _mm512_set1_epi32(g[j * 2 + 1]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                sums[j][half] = _mm512_add_epi32(sums[j][half], _mm512_madd_epi16(even[half], g_even));
                sums[j][half] = _mm512_add_epi32(sums[j][half], _mm512_madd_epi16(odd[half], g_odd));
            }
        }
    }
    alignas(64) int32_t stored[kQueries][kPanelRows];
#pragma GCC unroll 12
    for (int j = 0; j < kQueries; ++j) {
        _mm512_store_si512(stored[j], sums[j][0]);
        _mm512_store_si512(stored[j] + 16, sums[j][1]);
    }
    return keep(stored, stats, tile, kept);
}

uint32_t pass(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    switch (tile.count) {
        case 1:
            return pass_tile<1>(codes, stats, steps, tile, kept);
        case 2:
            return pass_tile<2>(codes, stats, steps, tile, kept);
        case 3:
            return pass_tile<3>(codes, stats, steps, tile, kept);
        case 4:
            return pass_tile<4>(codes, stats, steps, tile, kept);
        case 5:
            return pass_tile<5>(codes, stats, steps, tile, kept);
        case 6:
            return pass_tile<6>(codes, stats, steps, tile, kept);
        case 7:
            return pass_tile<7>(codes, stats, steps, tile, kept);
        default:
            return pass_tile<8>(codes, stats, steps, tile, kept);
    }
}

}  // namespace

const Kernels kAvx512 = {"avx512", false, 8, pass, pack_row<Vector>, dot<Vector>, exact<Vector>};

}  // namespace valm

#endif
