// The kernels in plain C++, for any processor.
#include <algorithm>

#include "topk/cpu/kernels.hpp"

namespace valm {
namespace {

void multiply(const Panel& panel, const Tile& tile, Sums& sums) {
    for (int j = 0; j < tile.count; ++j) {
        std::fill_n(sums[j], kPanelRows, 0);
        for (int64_t step = 0; step < panel.steps; ++step) {
            const int16_t* g = static_cast<const int16_t*>(tile.codes) + (step * tile.count + j) * 4;
            const uint8_t* c = panel.codes + step * kPanelRows * 4;
            for (int row = 0; row < kPanelRows; ++row) {  // g is stored in the order 0 2 1 3
                sums[j][row] +=
                    c[row * 4] * g[0] + c[row * 4 + 2] * g[1] + c[row * 4 + 1] * g[2] + c[row * 4 + 3] * g[3];
            }
        }
    }
}

}  // namespace

const Kernels kGeneric = {QueryLayout::kWords, 12, 256, nullptr, nullptr, pass<multiply>, pack_row, dot, exact};

}  // namespace valm
