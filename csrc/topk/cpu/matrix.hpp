// The shapes of AMX's registers, matrices of 16 rows of 64 bytes, and the layout of a tile's queries in them. The
// packed codes of half a panel at 16 steps are such a matrix: 16 rows of one step each, four bytes of every row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "topk/cpu/first_pass.hpp"

namespace valm {

constexpr int kMatrixRows = 16, kMatrixBytes = 64;
static_assert(kMaxTile == 2 * kMatrixRows && kPanelRows == 2 * kMatrixRows);

// The steps that a matrix holds, and how many matrices hold all steps.
inline int64_t matrix_steps(int64_t steps) { return std::min<int64_t>(steps, kMatrixBytes / 4); }
inline int64_t matrices(int64_t steps) { return (steps + kMatrixBytes / 4 - 1) / (kMatrixBytes / 4); }

// The first step of matrix m. If the steps do not fill the last matrix, it starts early: at steps that the matrix
// before covers too, its queries are zero.
inline int64_t first_step(int64_t steps, int64_t m) {
    return std::min<int64_t>(m * (kMatrixBytes / 4), steps - matrix_steps(steps));
}

}  // namespace valm
