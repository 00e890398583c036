// The shapes of AMX's registers, matrices of 16 rows of 64 bytes, and how a tile's queries lie in them. The codes of
// half of a panel at 16 steps are a matrix as they are packed: 16 rows of one step each, four bytes of every row.
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

// The first step of matrix m. The last starts early where the steps do not fill it; where it covers steps of the one
// before, its queries are zero.
inline int64_t first_step(int64_t steps, int64_t m) {
    return std::min<int64_t>(m * (kMatrixBytes / 4), steps - matrix_steps(steps));
}

}  // namespace valm
