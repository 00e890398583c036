// The kernels for AVX-512 with VNNI: four products of bytes a lane and instruction.
#if defined(__x86_64__)

#include "topk/avx512.hpp"

namespace valm {
namespace {

template <int kQueries>
uint32_t pass_tile(const uint8_t* codes, const float* stats, int64_t steps, const Tile& tile, Kept& kept) {
    __m512i sums[kQueries][2];
#pragma GCC unroll 12
    for (int j = 0; j < kQueries; ++j) sums[j][0] = sums[j][1] = _mm512_set1_epi32(tile.start[j]);
    const int32_t* g = static_cast<const int32_t*>(tile.codes);
    for (int64_t step = 0; step < steps; ++step, codes += kPanelRows * 4, g += kQueries) {
        const __m512i low = _mm512_loadu_si512(codes);
        const __m512i high = _mm512_loadu_si512(codes + 64);
#pragma GCC unroll 12
        for (int j = 0; j < kQueries; ++j) {
            const __m512i query = _mm512_set1_epi32(g[j]);
            sums[j][0] = _mm512_dpbusd_epi32(sums[j][0], low, query);
            sums[j][1] = _mm512_dpbusd_epi32(sums[j][1], high, query);
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
        case 8:
            return pass_tile<8>(codes, stats, steps, tile, kept);
        case 9:
            return pass_tile<9>(codes, stats, steps, tile, kept);
        case 10:
            return pass_tile<10>(codes, stats, steps, tile, kept);
        case 11:
            return pass_tile<11>(codes, stats, steps, tile, kept);
        default:
            return pass_tile<12>(codes, stats, steps, tile, kept);
    }
}

}  // namespace

const Kernels kAvx512Vnni = {"avx512vnni", true, 12, pass, pack_row<Vector>, dot<Vector>, exact<Vector>};

}  // namespace valm

#endif
