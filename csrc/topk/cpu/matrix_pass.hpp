// The first pass by products of matrices, for AMX or, with arrays as registers, for any processor. Local to the
// including file.
#pragma once

#include "topk/cpu/kernels.hpp"
#include "topk/cpu/matrix.hpp"

namespace valm {
namespace {

// The sums of a tile of at most 16 queries, or 32 if kTwo. Calls meanwhile(part, parts) between products, which take
// long and need no other registers.
//
// Registers names eight matrices. Its functions are zero<r>(), load<r>(from, stride), load_once<r>(from, stride) for
// data that the cache need not keep, store<r>(to, stride), and add<sum, queries, codes>(), which adds the products of
// 16 queries' signed bytes and 16 rows' unsigned bytes to sums of 32 bits.
template <class Registers, bool kTwo, class Meanwhile>
void multiply_matrices(const Panel& panel, const Tile& tile, Sums& sums, Meanwhile meanwhile) {
    constexpr int64_t kSumStride = sizeof sums[0], kCodeStride = kPanelRows * 4;
    const int8_t* queries = static_cast<const int8_t*>(tile.codes);
    const int64_t parts = matrices(panel.steps);
    Registers::template zero<0>();
    Registers::template zero<1>();
    if constexpr (kTwo) {
        Registers::template zero<2>();
        Registers::template zero<3>();
    }
    for (int64_t m = 0; m < parts; ++m, queries += kMaxTile * kMatrixBytes) {
        const uint8_t* codes = panel.codes + first_step(panel.steps, m) * kCodeStride;
        Registers::template load<6>(codes, kCodeStride);
        Registers::template load_once<4>(queries, kMatrixBytes);
        Registers::template add<0, 4, 6>();
        Registers::template load<7>(codes + kMatrixRows * 4, kCodeStride);
        Registers::template add<1, 4, 7>();
        if constexpr (kTwo) {
            Registers::template load_once<5>(queries + kMatrixRows * kMatrixBytes, kMatrixBytes);
            Registers::template add<2, 5, 6>();
            Registers::template add<3, 5, 7>();
        }
        meanwhile(m, parts);
    }
    Registers::template store<0>(sums[0], kSumStride);
    Registers::template store<1>(sums[0] + kMatrixRows, kSumStride);
    if constexpr (kTwo) {
        Registers::template store<2>(sums[kMatrixRows], kSumStride);
        Registers::template store<3>(sums[kMatrixRows] + kMatrixRows, kSumStride);
    }
}

// Kernels::pass. It finds the rows that a tile keeps while the next tile's products run.
template <class Registers>
Hit* matrix_pass(const Panel& panel, const Tile* tiles, size_t n_tiles, const float* theta, Hit* hits) {
    alignas(64) Sums sums[2];
    for (size_t t = 0; t < n_tiles; ++t) {
        const auto keep_some_of_last = [&](int64_t part, int64_t parts) {
            if (t == 0) return;
            const Tile& last = tiles[t - 1];
            const int begin = static_cast<int>(part * last.count / parts);
            const int end = static_cast<int>((part + 1) * last.count / parts);
            hits = keep(sums[(t - 1) % 2], panel.stats, last, begin, end, theta, hits);
        };
        if (tiles[t].count > kMatrixRows) {
            multiply_matrices<Registers, true>(panel, tiles[t], sums[t % 2], keep_some_of_last);
        } else {
            multiply_matrices<Registers, false>(panel, tiles[t], sums[t % 2], keep_some_of_last);
        }
    }
    const Tile& last = tiles[n_tiles - 1];
    return keep(sums[(n_tiles - 1) % 2], panel.stats, last, 0, last.count, theta, hits);
}

}  // namespace
}  // namespace valm
