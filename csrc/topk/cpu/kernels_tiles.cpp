// AMX's kernels with arrays as its registers, in plain C++, so that tests run them on any processor.
#ifdef VALM_KERNELS_EMULATE_AMX

#include <cstring>

#include "topk/cpu/matrix_pass.hpp"

namespace valm {
namespace {

thread_local uint8_t registers[8][kMatrixRows][kMatrixBytes];
thread_local int64_t steps_held;

int64_t rows_of(int r) { return r == 6 || r == 7 ? steps_held : kMatrixRows; }
int64_t bytes_of(int r) { return r == 4 || r == 5 ? steps_held * 4 : kMatrixBytes; }

struct Registers {
    template <int r>
    static void zero() {
        std::memset(registers[r], 0, sizeof registers[r]);
    }
    template <int r>
    static void load(const void* from, int64_t stride) {
        for (int64_t i = 0; i < rows_of(r); ++i) {
            std::memcpy(registers[r][i], static_cast<const uint8_t*>(from) + i * stride, bytes_of(r));
        }
    }
    template <int r>
    static void load_once(const void* from, int64_t stride) {
        load<r>(from, stride);
    }
    template <int r>
    static void store(void* to, int64_t stride) {
        for (int64_t i = 0; i < rows_of(r); ++i) {
            std::memcpy(static_cast<uint8_t*>(to) + i * stride, registers[r][i], bytes_of(r));
        }
    }
    template <int sum, int queries, int codes>
    static void add() {
        for (int query = 0; query < kMatrixRows; ++query) {
            int32_t sums[kMatrixRows];
            std::memcpy(sums, registers[sum][query], sizeof sums);
            for (int64_t step = 0; step < steps_held; ++step) {
                int8_t g[4];
                std::memcpy(g, registers[queries][query] + step * 4, sizeof g);
                const uint8_t* c = registers[codes][step];
                for (int row = 0; row < kMatrixRows; ++row, c += 4) {
                    sums[row] += g[0] * c[0] + g[1] * c[1] + g[2] * c[2] + g[3] * c[3];
                }
            }
            std::memcpy(registers[sum][query], sums, sizeof sums);
        }
    }
};

void begin(int64_t steps) { steps_held = matrix_steps(steps); }

}  // namespace

const Kernels kTiles = {QueryLayout::kMatrix,   kMaxTile, kMaxGroup, begin, nullptr,
                        matrix_pass<Registers>, pack_row, dot,       exact};

}  // namespace valm

#endif
